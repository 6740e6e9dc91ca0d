"""What must hold for the run to pass, by the name of the case.

Speeds are stated for the shapes of Llama-3-8B on a GPU with the memory of an H100 or more, mostly as ratios, so that
they hold for others, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from loramill_bench.results import Result


@dataclass(frozen=True, slots=True)
class Criterion:
    """The target of all cases whose name matches a pattern.

    Attributes:
        cases: the pattern, with * for any text.
        target: worst acceptable value; with `over_floor`, in addition to that.
        better: whether lower or higher values are better.
        over_floor: multiple of the case's floor that is acceptable; None: the target alone counts.
        when_dry: whether it also holds on a CPU with tiny shapes: a criterion of correctness, not of speed.
    """

    cases: str
    target: float
    better: Literal["lower", "higher"] = "lower"
    over_floor: float | None = None
    when_dry: bool = False

    def matches(self, case: str) -> bool:
        """Whether this is the criterion of a case."""
        return fnmatchcase(case, self.cases)

    def judge(self, result: Result) -> Result:
        """The result with the target."""
        target = self.target
        if self.over_floor is not None and result.floor is not None:
            target = max(self.over_floor * result.floor, result.floor + self.target)
        return replace(result, target=target, better=self.better)


#: The first match applies to a case; a case without a match has no target.
CRITERIA: tuple[Criterion, ...] = (
    Criterion("gpu machine: problems", 0, when_dry=True),
    # cuDNN would make a plan for each length, in 0.4 s.
    Criterion("gpu machine: attention of a new length over a known one", 3.0),
    Criterion("gpu checks *: worst error", 1.0, when_dry=True),
    Criterion("gpu kernels lora *", 6.0, over_floor=2.0),
    Criterion("gpu kernels attention *", 8.0, over_floor=1.6),
    Criterion("gpu kernels training *", 8.0, over_floor=1.6),
    Criterion("gpu kernels against *", 1.0, "higher"),
    Criterion("gpu engine: warm-up", 30.0),
    Criterion("gpu decode 1/*: over the floor", 1.35),
    Criterion("gpu decode 32/*: over the floor", 1.45),
    Criterion("gpu decode 128/*: over the floor", 1.5),
    Criterion("gpu decode *: temperature 1 over greedy", 1.03),
    Criterion("gpu decode *: idle adapters added", 0.005),
    Criterion("gpu decode *: launches per layer", 19),
    Criterion("gpu prompt *: a new length over a known one", 1.3),
    Criterion("gpu prefix: memory", 50.0),
    Criterion("gpu prefix: first token", 60.0),
    Criterion("gpu loads: p99 gap", 1.1),
    Criterion("gpu engine: answers of a broken adapter", 3, "higher", when_dry=True),
    Criterion("gpu engine: tokens that differ next to a broken adapter", 0, when_dry=True),
    Criterion("gpu logits *", 0.03, when_dry=True),
    Criterion("gpu quantized nf4 1: over bfloat16", 1.0),
    Criterion("gpu quantized nf4: 8B", 3.0),
    # float8 rounds x, too: to 3 bits, half of a 16th at most.
    Criterion("gpu quantized fp8 *: error", 0.04),
    Criterion("gpu quantized *: error", 0.02, when_dry=True),
    Criterion("gpu train 8x512*: tokens per second", 9000, "higher"),
    Criterion("gpu train *: sizing too low", 0.03),
    Criterion("gpu train *: sizing too high", 0.05),
    Criterion("gpu train *: losses that are not finite", 0, when_dry=True),
    Criterion("gpu train: difference by recomputation", 0, when_dry=True),
    Criterion("gpu train 12,288 supervised tokens: peak", 22.0),
    Criterion("gpu tenants *: together over apart", 1.2, "higher"),
    Criterion("gpu * errors", 0, when_dry=True),
)


def judge(results: Sequence[Result], *, dry: bool) -> list[Result]:
    """The results with their targets."""
    return [_judge(result, dry) for result in results]


def _judge(result: Result, dry: bool) -> Result:
    found = next((each for each in CRITERIA if each.matches(result.case)), None)
    if found is None or (dry and not found.when_dry):
        return result
    return found.judge(result)
