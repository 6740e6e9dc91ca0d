"""Decode steps with adapters, compared with PEFT's `adapter_names`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill_bench.engine.driver import decoding_engine
from loramill_bench.engine.harness import Harness
from loramill_bench.results import Result

_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class PeftStep:
    """A decode step whose sequences are divided equally among adapters; `target`: minimum ratio of PEFT's time."""

    batch: int
    adapters: int
    target: float

    @property
    def name(self) -> str:
        """Name with the numbers of sequences and adapters."""
        return f"peft {self.batch}/{self.adapters}"


CASES = (PeftStep(8, 8, 10), PeftStep(32, 32, 10), PeftStep(8, 1, 7), PeftStep(32, 1, 4))


def measure(harness: Harness, case: PeftStep, rounds: int) -> list[Result]:
    """Compares steps at a context of 64 tokens, in turns."""
    owners = [str(sequence * case.adapters // case.batch) for sequence in range(case.batch)]
    step_rounds = max(1, rounds // 3)
    with decoding_engine(harness, owners, _CONTEXT, step_rounds) as engine:
        variants = {"ours": engine.step, "PEFT": _peft_step(harness, owners)}
        spent = interleaved(variants, Effort(0, step_rounds))
    return [
        Result(f"{case.name}: PEFT's step over ours", spent["PEFT"] / spent["ours"], "x", case.target, "higher"),
        Result(f"{case.name}: decode", case.batch / spent["ours"], "tokens/s", better="higher"),
    ]


def _peft_step(harness: Harness, owners: list[str]) -> Callable[[], None]:
    """PEFT's greedy step of one sequence per entry of `owners`, each with a prompt of 64 tokens."""
    model = harness.peft_model
    with torch.inference_mode():
        prompts = torch.tensor(harness.prompts(len(owners), _CONTEXT))
        first = model(input_ids=prompts, use_cache=True, logits_to_keep=1, adapter_names=owners)
    cache = first.past_key_values
    tokens = first.logits.argmax(-1)

    @torch.inference_mode()
    def step() -> None:
        nonlocal tokens
        answer = model(input_ids=tokens, past_key_values=cache, use_cache=True, adapter_names=owners)
        tokens = answer.logits.argmax(-1)

    return step
