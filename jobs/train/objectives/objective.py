"""The objective of a job: makes the loss of each of its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch

from loramill.data.encoding import EncodedExample, EncodedPair, LabeledAnswer, TrainingExample
from loramill.jobs.train.engine import Work
from loramill.jobs.train.objectives.batch import BatchLoss, SupervisedLoss
from loramill.jobs.train.objectives.losses import kto_kl
from loramill.jobs.train.objectives.preference import PreferenceLoss, judged_examples
from loramill.types import JobSpec

#: A file of a job's examples.
Split = Literal["train", "valid"]
#: Computes log-probabilities of the answers of sequences, float64 [n], by the adapter as it is.
Score = Callable[[Sequence[EncodedExample]], Work[torch.Tensor]]


class Objective(Protocol):
    """The objective of a job.

    Attributes:
        reference: what is computed before the first step and kept in checkpoints, by split; float64 [examples, 2].
    """

    reference: Mapping[str, torch.Tensor]

    def prepare(self, score: Score) -> Work[None]:
        """Computes `reference` with the adapter as it is before the first step, unless it is known."""
        ...

    def batch(self, split: Split, indices: Sequence[int], score: Score) -> Work[BatchLoss]:
        """Returns the loss of the examples of these indices."""
        ...


class SupervisedObjective:
    """The likelihood of answers."""

    def __init__(self, examples: Mapping[Split, Sequence[EncodedExample]]) -> None:
        self.reference: Mapping[str, torch.Tensor] = {}
        self._examples = examples

    def prepare(self, score: Score) -> Work[None]:
        """Nothing has to be prepared."""
        yield from ()

    def batch(self, split: Split, indices: Sequence[int], score: Score) -> Work[BatchLoss]:
        """As `Objective.batch`."""
        yield from ()
        return SupervisedLoss([self._examples[split][index] for index in indices])


class PreferenceObjective:
    """Preferences, compared with the model before the first step."""

    def __init__(self, spec: JobSpec, examples: Mapping[Split, Sequence[EncodedPair | LabeledAnswer]]) -> None:
        self.reference: Mapping[str, torch.Tensor] = {}
        self._spec = spec
        self._examples = {split: judged_examples(of_split, spec) for split, of_split in examples.items()}

    def prepare(self, score: Score) -> Work[None]:
        """As `Objective.prepare`; ORPO has no reference."""
        if self.reference or self._spec.objective == "orpo":
            return
        found: dict[str, torch.Tensor] = {}
        for split, examples in self._examples.items():
            if examples:
                scores = yield from score([sequence for example in examples for sequence in example.compared])
                found[split] = scores.view(-1, 2)
        self.reference = found

    def batch(self, split: Split, indices: Sequence[int], score: Score) -> Work[BatchLoss]:
        """As `Objective.batch`; of KTO, it first computes how far the model has moved."""
        examples = [self._examples[split][index] for index in indices]
        if self._spec.objective == "orpo":
            return PreferenceLoss(self._spec, examples, None)
        reference, kl = self.reference[split][list(indices)], 0.0
        mismatched = [example.mismatched for example in examples if example.mismatched is not None]
        if mismatched:
            kl = kto_kl((yield from score(mismatched)), reference[:, 1])
        return PreferenceLoss(self._spec, examples, reference, kl)


def objective_of(
    spec: JobSpec, train: Sequence[TrainingExample], valid: Sequence[TrainingExample]
) -> SupervisedObjective | PreferenceObjective:
    """The objective of a job with its examples, which are of the kind that it needs."""
    examples: dict[Split, Sequence[TrainingExample]] = {"train": train, "valid": valid}
    if spec.objective == "sft":
        return SupervisedObjective(
            {split: [each for each in of if isinstance(each, EncodedExample)] for split, of in examples.items()}
        )
    return PreferenceObjective(
        spec, {split: [each for each in of if not isinstance(each, EncodedExample)] for split, of in examples.items()}
    )
