"""Whole runs without adapters, against transformers' continuous batching.

Its loop runs in a thread of its own, so both are measured in the CPU time of the whole process. Nothing else in it is
at work: the thread that waits for the results sleeps.
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
from loramill_bench.engine.load import Load
from loramill_bench.engine.subject import Subject
from loramill_bench.measure import Result

#: Tokens of a step, and of a block of the rival's KV cache: the fastest of what was tried.
_BUDGET, _PAGE = 512, 32
_PATIENCE = 300.0  # seconds for the first answer


@dataclass(frozen=True, slots=True)
class Shape:
    """Prompts of so many tokens, how many at once, and the tokens of an answer."""

    prompt: int
    batch: int
    new: int

    @property
    def name(self) -> str:
        """Tokens of a prompt, requests, tokens of an answer."""
        return f"run {self.prompt}/{self.batch}/{self.new}"


CASES = (Shape(64, 8, 64), Shape(64, 32, 64), Shape(384, 16, 32))
_TARGET = 3.0


def measure(subject: Subject, shape: Shape, rounds: int) -> list[Result]:
    """A run of each to warm up, and one that counts; greedy, and no token ends an answer."""
    with _theirs(subject, shape) as theirs:
        variants = {"ours": _ours(subject, shape), "theirs": theirs}
        spent = interleaved(variants, Effort(0, max(1, rounds // 24)), process_time)
    tokens = shape.batch * shape.new
    return [
        Result(f"{shape.name}: transformers over ours", spent["theirs"] / spent["ours"], "x", _TARGET, "higher"),
        Result(f"{shape.name}: answers", tokens / spent["ours"], "tokens/s", better="higher"),
        Result(f"{shape.name}: transformers' answers", tokens / spent["theirs"], "tokens/s", better="higher"),
    ]


def _ours(subject: Subject, shape: Shape) -> Callable[[], None]:
    room = shape.batch * (shape.prompt + shape.new + 16)
    config = EngineConfig(max_batch_tokens=_BUDGET, max_sequences=shape.batch, kv_tokens=room)

    def run() -> None:
        with subject.engine(config) as engine:
            Load(engine).run(subject.requests([None] * shape.batch, shape.prompt, shape.new))

    return run


@contextmanager
def _theirs(subject: Subject, shape: Shape) -> Iterator[Callable[[], None]]:
    """A run on a manager that is there already, as is its KV cache; without flash attention, the base's SDPA."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load_for_training(subject.base, torch.bfloat16)
    batching = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=shape.batch * -(-(shape.prompt + shape.new) // _PAGE) + 8,
        max_batch_tokens=_BUDGET,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    generation = GenerationConfig(max_new_tokens=shape.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching, warmup=False
    ) as manager:

        def run() -> None:
            manager.add_requests(subject.prompts(shape.batch, shape.prompt), max_new_tokens=shape.new)
            answers = [manager.get_result(timeout=_PATIENCE) for _ in range(shape.batch)]
            if any(answer is None or len(answer.generated_tokens) != shape.new for answer in answers):
                raise EngineFault(f"transformers' continuous batching gave no answers of {shape.new} tokens: {answers}")

        yield run
