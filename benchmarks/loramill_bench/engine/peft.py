"""A decode step with adapters, against PEFT's `adapter_names`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill_bench.engine.load import decoding
from loramill_bench.engine.subject import Subject
from loramill_bench.measure import Result

_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class Mix:
    """Sequences, divided equally among so many adapters; how many times slower PEFT must be at least."""

    batch: int
    adapters: int
    target: float

    @property
    def name(self) -> str:
        """Sequences and adapters."""
        return f"peft {self.batch}/{self.adapters}"


CASES = (Mix(8, 8, 10), Mix(32, 32, 10), Mix(8, 1, 7), Mix(32, 1, 4))


def measure(subject: Subject, mix: Mix, rounds: int) -> list[Result]:
    """Steps from a context of 64, in turn."""
    owners = [str(sequence * mix.adapters // mix.batch) for sequence in range(mix.batch)]
    few = max(1, rounds // 3)
    with decoding(subject, owners, _CONTEXT, few) as engine:
        variants = {"ours": engine.step, "PEFT": _step(subject, owners)}
        spent = interleaved(variants, Effort(0, few))
    return [
        Result(f"{mix.name}: PEFT's step over ours", spent["PEFT"] / spent["ours"], "x", mix.target, "higher"),
        Result(f"{mix.name}: decode", mix.batch / spent["ours"], "tokens/s", better="higher"),
    ]


def _step(subject: Subject, owners: list[str]) -> Callable[[], None]:
    """A greedy step of a sequence an owner, each from a prompt of 64 tokens on."""
    model = subject.tuned
    with torch.inference_mode():
        prompts = torch.tensor(subject.prompts(len(owners), _CONTEXT))
        first = model(input_ids=prompts, use_cache=True, logits_to_keep=1, adapter_names=owners)
    known = first.past_key_values
    tokens = first.logits.argmax(-1)

    @torch.inference_mode()
    def step() -> None:
        nonlocal tokens
        answer = model(input_ids=tokens, past_key_values=known, use_cache=True, adapter_names=owners)
        tokens = answer.logits.argmax(-1)

    return step
