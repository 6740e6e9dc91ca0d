"""Generation from submission to last token, without adapters, compared with transformers' continuous batching.

transformers steps in its own thread, so both are measured in CPU time of the whole process. No other thread works
meanwhile: the one that waits for the results sleeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time

import torch

from loramill.errors import EngineFault
from loramill.models.catalog import load_for_training
from loramill.pipelines.compare.timing import Effort, interleaved
from loramill.serve.engine import EngineConfig
from loramill_bench.engine.driver import EngineDriver
from loramill_bench.engine.harness import Harness
from loramill_bench.results import Result

#: Tokens per step, and per block of transformers' KV cache: the fastest values of those tried.
_STEP_TOKENS, _PAGE_TOKENS = 512, 32
_TIMEOUT_SECONDS = 300.0  # seconds for the first answer


@dataclass(frozen=True, slots=True)
class Generation:
    """A batch of prompts: tokens per prompt, number of prompts, and tokens per answer."""

    prompt: int
    batch: int
    new: int

    @property
    def name(self) -> str:
        """Name with tokens per prompt, number of prompts, and tokens per answer."""
        return f"generate {self.prompt}/{self.batch}/{self.new}"


CASES = (Generation(64, 8, 64), Generation(64, 32, 64), Generation(384, 16, 32))
_TARGET = 3.0


def measure(harness: Harness, case: Generation, rounds: int) -> list[Result]:
    """Runs both after a warm-up run of each; sampling is greedy, and no token ends an answer early."""
    with _transformers_runner(harness, case) as theirs:
        variants = {"ours": _run_engine(harness, case), "theirs": theirs}
        spent = interleaved(variants, Effort(0, max(1, rounds // 24)), process_time)
    tokens = case.batch * case.new
    return [
        Result(f"{case.name}: transformers over ours", spent["theirs"] / spent["ours"], "x", _TARGET, "higher"),
        Result(f"{case.name}: output throughput", tokens / spent["ours"], "tokens/s", better="higher"),
        Result(f"{case.name}: transformers' output throughput", tokens / spent["theirs"], "tokens/s", better="higher"),
    ]


def _run_engine(harness: Harness, case: Generation) -> Callable[[], None]:
    room = case.batch * (case.prompt + case.new + 16)
    config = EngineConfig(max_batch_tokens=_STEP_TOKENS, max_sequences=case.batch, kv_tokens=room)

    def run() -> None:
        with harness.engine(config) as engine:
            EngineDriver(engine).run(harness.requests([None] * case.batch, case.prompt, case.new))

    return run


@contextmanager
def _transformers_runner(harness: Harness, case: Generation) -> Iterator[Callable[[], None]]:
    """A run of transformers with an existing manager and KV cache; without flash attention, it uses SDPA."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load_for_training(harness.base, torch.bfloat16)
    batching = ContinuousBatchingConfig(
        page_size=_PAGE_TOKENS,
        num_blocks=case.batch * -(-(case.prompt + case.new) // _PAGE_TOKENS) + 8,
        max_batch_tokens=_STEP_TOKENS,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    generation = GenerationConfig(max_new_tokens=case.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching, warmup=False
    ) as manager:

        def run() -> None:
            manager.add_requests(harness.prompts(case.batch, case.prompt), max_new_tokens=case.new)
            answers = [manager.get_result(timeout=_TIMEOUT_SECONDS) for _ in range(case.batch)]
            if any(answer is None or len(answer.generated_tokens) != case.new for answer in answers):
                raise EngineFault(
                    f"transformers' continuous batching did not return answers of {case.new} tokens: {answers}"
                )

        yield run
