"""The gate on simulated nightly runs, whose scores are resampled from measured ones (`measure_scores.py`).

A run has `EXAMPLES` new and as many old held-out examples. Each is a measured example, with its scores of a champion
and of a challenger that continues from it.

- Without a gain, the two scores are swapped at random, so that neither is better. The share of the examples on which
  they differ is as measured.
- With a gain of 5 points, some of the new examples have a topic that the champion has not learned: there, its score is
  the base's. The other examples are as without a gain, or the versions answer them alike.
- With shuffled labels, the challenger was trained on the answers of other questions. Its new examples have such ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loramill.errors import SetupError
from loramill.pipelines.nightly.gate.candidates import GateDecision, PairedScores, PairedSlice, SliceKind
from loramill.pipelines.nightly.gate.policy import decide
from loramill.pipelines.nightly.gate.sequential import PendingSlice, decide_early
from loramill_bench.results import Result

#: Highest rate of false promotions, and lowest rates of promoted gains and of held or rejected shuffled labels.
FALSE_PROMOTIONS, POWER, SHUFFLED = 0.05, 0.90, 0.95
RUNS, EXAMPLES, GAIN = 200, 200, 0.05
#: Smaller held-out sets, whose false promotions are counted, too.
SMALL = (10, 30)
#: Examples after which evaluation may stop.
CHUNK = 40
FILE = Path(__file__).parent / "scores.json"

#: Scores by candidate; references are "test" or "shuffled".
Scores = Mapping[str, NDArray[np.float64]]
Slices = tuple[PairedSlice, PairedSlice]
Draw = Callable[[np.random.Generator], Slices]


def results(metric: str) -> list[Result]:
    """Rates of promotions by the default policy.

    Raises:
        SetupError: No scores were measured.
    """
    measured = _read(metric)
    plain = partial(without_gain, measured, EXAMPLES)
    name = f"gate {metric}"
    return [
        Result(
            f"{name}: examples on which equally good versions differ",
            float(np.mean([_churn(each["test"]) for each in measured])),
            "of examples",
        ),
        Result(
            f"{name}: promoted without a gain, {EXAMPLES} examples",
            promoted(plain, RUNS),
            "of runs",
            FALSE_PROMOTIONS,
        ),
        *(
            Result(
                f"{name}: promoted without a gain, {size} examples",
                promoted(partial(without_gain, measured, size), RUNS),
                "of runs",
                FALSE_PROMOTIONS,
            )
            for size in SMALL
        ),
        Result(
            f"{name}: promoted with a gain of {100 * GAIN:.0f} points alone, {EXAMPLES} examples",
            promoted(partial(with_gain, measured, EXAMPLES, GAIN, False), RUNS),
            "of runs",
            POWER,
            "higher",
        ),
        *(
            Result(
                f"{name}: promoted with a gain of {100 * GAIN:.0f} points and other differences, {size} examples",
                promoted(partial(with_gain, measured, size, GAIN, True), RUNS),
                "of runs",
            )
            for size in (EXAMPLES, 2 * EXAMPLES)
        ),
        Result(
            f"{name}: held or rejected with shuffled labels, {EXAMPLES} examples",
            1 - promoted(partial(with_shuffled_labels, measured, EXAMPLES), RUNS),
            "of runs",
            SHUFFLED,
            "higher",
        ),
        Result(f"{name}: examples evaluated without a gain", evaluated(plain, max(1, RUNS // 10)), "of all"),
    ]


def promoted(draw: Draw, runs: int) -> float:
    """The share of runs that the gate promotes."""
    return sum(decide(draw(np.random.default_rng(seed))).promote for seed in range(runs)) / runs


def evaluated(draw: Draw, runs: int) -> float:
    """The mean share of a run's examples that are evaluated, if it stops once the decision is certain."""
    return sum(_evaluated(draw(np.random.default_rng(seed))) for seed in range(runs)) / runs


def without_gain(measured: Iterable[Mapping[str, Scores]], size: int, random: np.random.Generator) -> Slices:
    """A run whose challenger is as good as its champion."""
    scores = _choose(measured, random)["test"]
    return _swapped("new", scores, size, random), _swapped("old", scores, size, random)


def with_gain(
    measured: Iterable[Mapping[str, Scores]], size: int, gain: float, differ: bool, random: np.random.Generator
) -> Slices:
    """A run whose challenger is better by `gain` on the new examples.

    Args:
        measured: The scores by tenant and reference.
        size: The number of new, and of old examples.
        gain: The mean gain, from which that of a run differs by chance.
        differ: Whether the versions differ on other examples as much as measured.
        random: The random numbers.
    """
    scores = _choose(measured, random)["test"]
    share = gain / (scores["challenger 1"].mean() - scores["base"].mean())
    if not differ:
        scores = {**scores, "champion": scores["challenger 1"], "challenger 2": scores["challenger 1"]}
    new, old = _swapped("new", scores, size, random), _swapped("old", scores, size, random)
    chosen, index = random.random(size) < share, random.integers(0, len(scores["base"]), size)
    examples = tuple(
        PairedScores(
            each.example, scores["base"][other], scores["challenger 1"][other], champion=float(scores["base"][other])
        )
        if learned
        else each
        for each, learned, other in zip(new.examples, chosen, index, strict=True)
    )
    return PairedSlice("new", "new", examples), old


def with_shuffled_labels(measured: Iterable[Mapping[str, Scores]], size: int, random: np.random.Generator) -> Slices:
    """A run whose new data has the answers of other questions."""
    scores = _choose(measured, random)
    return (
        _slice("new", scores["shuffled"], "spoiled", random.integers(0, len(scores["shuffled"]["base"]), size)),
        _slice("old", scores["test"], "spoiled", random.integers(0, len(scores["test"]["base"]), size)),
    )


def _choose(measured: Iterable[Mapping[str, Scores]], random: np.random.Generator) -> Mapping[str, Scores]:
    tenants = list(measured)
    return tenants[random.integers(0, len(tenants))]


def _swapped(kind: SliceKind, scores: Scores, size: int, random: np.random.Generator) -> PairedSlice:
    """Resampled examples; champion and challenger are swapped in half of them."""
    challenger = f"challenger {random.integers(1, 3)}"
    drawn = _slice(kind, scores, challenger, random.integers(0, len(scores["base"]), size))
    return PairedSlice(
        kind,
        kind,
        tuple(
            PairedScores(each.example, each.base, each.champion or 0.0, each.challenger) if swap else each
            for each, swap in zip(drawn.examples, random.random(size) < 0.5, strict=True)
        ),
    )


def _slice(kind: SliceKind, scores: Scores, challenger: str, indices: NDArray[np.int64]) -> PairedSlice:
    columns = zip(*(scores[name][indices].tolist() for name in ("base", challenger, "champion")), strict=True)
    return PairedSlice(kind, kind, tuple(PairedScores(f"{kind} {number}", *row) for number, row in enumerate(columns)))


def _evaluated(slices: Slices) -> float:
    """The share of the examples after which the decision is certain; the new ones come first."""
    examples = [(part, each) for part in slices for each in part.examples]
    for done in range(CHUNK, len(examples), CHUNK):
        if _early(examples[:done], examples[done:]) is not None:
            return done / len(examples)
    return 1.0


def _early(
    known: list[tuple[PairedSlice, PairedScores]], left: list[tuple[PairedSlice, PairedScores]]
) -> GateDecision | None:
    kinds: tuple[SliceKind, ...] = ("new", "old")
    return decide_early(
        [PairedSlice(kind, kind, tuple(each for part, each in known if part.kind == kind)) for kind in kinds],
        [PendingSlice(kind, kind, tuple(each.example for part, each in left if part.kind == kind)) for kind in kinds],
    )


def _churn(scores: Scores) -> float:
    """The share of examples on which champion and challenger score differently."""
    return float(np.mean([scores[f"challenger {seed}"] != scores["champion"] for seed in (1, 2)]))


def _read(metric: str) -> list[Mapping[str, Scores]]:
    if not FILE.is_file():
        raise SetupError(
            f"{FILE} does not exist: measure the scores first, by "
            "`python -m loramill_bench.nightly.measure_scores FOLDER TENANT…`."
        )
    return [
        {
            references: {name: np.array(each) for name, each in by_metric[metric].items()}
            for references, by_metric in tenant.items()
        }
        for tenant in json.loads(FILE.read_text()).values()
    ]
