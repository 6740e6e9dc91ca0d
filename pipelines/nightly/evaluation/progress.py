"""How far the evaluation of an adapter is, and whether its decision is certain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loramill.errors import EvaluationError
from loramill.pipelines.nightly.definition import GateDefinition
from loramill.pipelines.nightly.evaluation.plan import EvalPlan
from loramill.pipelines.nightly.evaluation.results import (
    GOLDEN_SLICE,
    LOWER_IS_BETTER,
    HeldOutExample,
    pair,
    slice_kind,
)
from loramill.pipelines.nightly.gate.candidates import GateDecision
from loramill.pipelines.nightly.gate.sequential import PendingSlice, decide_early
from loramill.types import ExampleResult

#: Examples that all candidates are finished at once, and the largest number of chunks: after each, the gate decides
#: twice, which takes 0.1 s with 400 examples.
CHUNK, CHUNKS = 40, 10


@dataclass(slots=True)
class Evaluation:
    """The evaluation of an adapter.

    Attributes:
        results: of the examples that were finished.
        ended: whether nothing is left, or the rest cannot change whether the challenger is promoted.
        answers, tokens: number of answers, and of tokens of prompts and answers.
    """

    plan: EvalPlan
    results: list[ExampleResult] = field(default_factory=list)
    finished: int = 0
    answers: int = 0
    tokens: int = 0
    ended: bool = False

    def next_chunk(self) -> Sequence[HeldOutExample]:
        """The examples to ask next: all that are left if the evaluation does not stop early."""
        every = self.plan.examples
        # A loss has no upper end, so that an example that is left may change everything.
        if not self.plan.definition.stop_early or self.plan.gate.metric in LOWER_IS_BETTER:
            return every[self.finished :]
        size = max(CHUNK, -(-len(every) // CHUNKS))
        return every[self.finished : self.finished + size]

    def add(self, results: Sequence[ExampleResult]) -> None:
        """Adds the results of the next chunk."""
        self.finished += len(self.next_chunk())
        self.results += results
        left = self.left
        self.ended = not left or decide_on(self.results, left, self.plan.gate) is not None

    @property
    def left(self) -> dict[str, list[str]]:
        """The examples that are left, by slice."""
        found: dict[str, list[str]] = {}
        for each in self.plan.examples[self.finished :]:
            for name in each.slices:
                found.setdefault(name, []).append(each.digest)
        return found


def decide_on(
    results: Sequence[ExampleResult], left: Mapping[str, Sequence[str]], policy: GateDefinition
) -> GateDecision | None:
    """The gate's decision; None if it depends on the examples that are left.

    Raises:
        DatasetInvalid: an example has no such score.
    """
    if left and policy.metric in LOWER_IS_BETTER:
        return None
    slices, golden = pair(results, policy.metric)
    pending = [PendingSlice(name, slice_kind(name), tuple(each)) for name, each in left.items() if name != GOLDEN_SLICE]
    decision = decide_early(slices, pending, golden, left.get(GOLDEN_SLICE, ()), policy)
    return None if decision is None else decision.model_copy(update={"metric": policy.metric})


def decide_recorded(
    results: Sequence[ExampleResult], left: Mapping[str, Sequence[str]], policy: GateDefinition
) -> GateDecision:
    """The gate's decision on a recorded evaluation.

    Raises:
        DatasetInvalid: an example has no such score.
        EvaluationError: the evaluation stopped early, and the policy has changed since.
    """
    decision = decide_on(results, left, policy)
    if decision is None:
        raise EvaluationError(
            "The evaluation stopped once the decision was certain, and by the present policy it is not: evaluate again "
            "by `loramill nightly retry RUN --from evaluate`."
        )
    return decision
