"""The evaluation of many tenants' candidates: in shared batches, adapter after adapter, and by PEFT's `set_adapter`.

Each of `TENANTS` tenants has a challenger and a champion, which answer `PROMPTS` questions, and so does the base. All
variants answer the same prompts with the same number of tokens, which no stop token shortens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from loramill.models.catalog import Base
from loramill.pipelines.compare.methods.transformers import greedy
from loramill.serve.engine import Engine, EngineConfig, Request, SamplingParams
from loramill.serve.model import load_decoder
from loramill_bench.engine.driver import EngineDriver
from loramill_bench.engine.harness import Harness, write_adapters
from loramill_bench.results import Result

TENANTS, PROMPTS = 16, 10
#: About the means of real tenants' examples: intents, calls with slots, short texts.
PROMPT_TOKENS, ANSWER_TOKENS = 40, 16
#: Least ratios of CPU time to that of shared batches.
ONE_BY_ONE, PEFT = 4.0, 8.0
#: Of the tenants, those that are measured where adapters follow each other: the time of each is that of any other.
MEASURED = 2


@dataclass(frozen=True, slots=True)
class Group:
    """The questions for one candidate of one tenant: token ids; `version` None: the base."""

    version: str | None
    prompts: tuple[tuple[int, ...], ...]


def results(base: Base, report: Callable[[str], object]) -> list[Result]:
    """Ratios of CPU time of this process, on one thread; takes about ten minutes and 3 GB of memory.

    Args:
        base: the base, which PEFT loads too.
        report: called with the name of each variant before it runs.
    """
    name = f"evaluation {TENANTS}x{PROMPTS}x3"
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as scratch:
        decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
        harness = Harness(base, decoder, write_adapters(decoder, Path(scratch), 2 * TENANTS))
        groups = list(candidates(harness))
        some = groups[: 3 * MEASURED]
        # A new engine for each, so that no adapter is loaded and no prompt is known; the first one warms up.
        _in_engine(harness, some[:3], together=True)
        report(f"{name}, in shared batches")
        shared = _in_engine(harness, groups, together=True)
        report(f"{name}, adapter after adapter")
        one_by_one = _in_engine(harness, some, together=False) * TENANTS / MEASURED
        report(f"{name}, by PEFT")
        peft = _by_peft(harness, some) * TENANTS / MEASURED
    return [
        Result(f"{name}: adapter after adapter over shared batches", one_by_one / shared, "x", ONE_BY_ONE, "higher"),
        Result(f"{name}: PEFT's set_adapter loop over shared batches", peft / shared, "x", PEFT, "higher"),
        Result(f"{name}: in shared batches", shared, "CPU-s"),
    ]


def candidates(harness: Harness) -> Iterator[Group]:
    """Challenger, champion and base of each tenant, with the same questions."""
    for tenant in range(TENANTS):
        prompts = tuple(map(tuple, harness.prompts(PROMPTS, PROMPT_TOKENS)))
        for version in (str(2 * tenant), str(2 * tenant + 1), None):
            yield Group(version, prompts)


def in_turns(groups: Sequence[Group]) -> list[tuple[str | None, tuple[int, ...]]]:
    """All questions in the order in which a nightly run sends them: candidates take turns."""
    return [(group.version, group.prompts[turn]) for turn in range(PROMPTS) for group in groups]


def _in_engine(harness: Harness, groups: Sequence[Group], *, together: bool) -> float:
    """CPU seconds of a new engine for all questions at once, or for those of one candidate after the other."""
    waves = [in_turns(groups)] if together else [[(each.version, one) for one in each.prompts] for each in groups]
    with harness.engine(EngineConfig()) as engine:
        began = time.process_time()
        _answer(engine, waves)
        return time.process_time() - began


def _answer(engine: Engine, waves: Sequence[Sequence[tuple[str | None, tuple[int, ...]]]]) -> None:
    driver, numbers = EngineDriver(engine), count()
    params = SamplingParams(max_tokens=ANSWER_TOKENS)
    for wave in waves:
        driver.run([Request(f"q{next(numbers)}", "bench", prompt, params, version) for version, prompt in wave])


def _by_peft(harness: Harness, groups: Sequence[Group]) -> float:
    """CPU seconds of PEFT for those of one candidate after the other, in one batch each."""
    model = harness.peft_model
    limits = [ANSWER_TOKENS] * PROMPTS
    greedy(model, groups[0].prompts[:1], [1], ())
    began = time.process_time()
    for group in groups:
        if group.version is not None:
            model.set_adapter(group.version)
        with model.disable_adapter() if group.version is None else nullcontext():
            greedy(model, group.prompts, limits, ())
    return time.process_time() - began
