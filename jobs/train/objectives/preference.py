"""Preference tuning of one job: which answers it compares, and the loss of its batches.

The reference is the model before the first step: the base with a new adapter, which changes nothing, or the version
that training starts from. Its log-probabilities are computed once, before the first step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loramill.data.encoding import EncodedExample, EncodedPair, LabeledAnswer
from loramill.jobs.train.batching import count_supervised_tokens
from loramill.jobs.train.forward import Predictions
from loramill.jobs.train.objectives import losses
from loramill.jobs.train.objectives.losses import AnswerLogProbs, PassLoss, sum_by_answer
from loramill.types import JobSpec


@dataclass(frozen=True, slots=True)
class JudgedExample:
    """An example of preference data.

    Attributes:
        answers: chosen and rejected; or the one with a label.
        desirable: whether the only answer is good.
        mismatched: KTO: the example's prompt with another example's answer.
    """

    answers: tuple[EncodedExample, ...]
    desirable: bool = True
    mismatched: EncodedExample | None = None

    @property
    def compared(self) -> tuple[EncodedExample, ...]:
        """The sequences whose log-probabilities of the reference are needed: two."""
        return self.answers if self.mismatched is None else (*self.answers, self.mismatched)


def judged_examples(examples: Sequence[EncodedPair | LabeledAnswer], spec: JobSpec) -> list[JudgedExample]:
    """The examples of a job's file.

    KTO estimates how far the model has moved from the reference on answers that it was not trained on: each prompt with
    the answer of one other example. Which one depends on the job's seed and is the same in all steps, so that the
    reference's log-probabilities are computed once. (TRL takes the answer of the neighbor in the batch. With neighbors
    in the file, which often are two answers to one prompt, the pairs would not be mismatched.)
    """
    pairs = [JudgedExample(each.sequences) for each in examples if isinstance(each, EncodedPair)]
    labeled = [each for each in examples if isinstance(each, LabeledAnswer)]
    order = random.Random(f"{spec.seed}/mismatched").sample(range(len(labeled)), len(labeled))
    other = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return pairs + [
        JudgedExample(
            each.sequences, each.desirable, _mismatched(each.answer, labeled[other[index]].answer, spec.max_length)
        )
        for index, each in enumerate(labeled)
    ]


def answer_log_probs(
    sequences: Sequence[EncodedExample], predictions: Predictions
) -> tuple[AnswerLogProbs, torch.Tensor]:
    """Log-probabilities of the answers of sequences, and the number of their tokens that are the most likely ones."""
    tokens = [count_supervised_tokens(sequence) for sequence in sequences]
    log_probs, correct = predictions.log_probs()
    count = sum(tokens)  # rows of few supervised tokens have copies of one
    return sum_by_answer(log_probs[:count], tokens), correct[:count].sum()


class PreferenceLoss:
    """The loss of one batch of preference tuning.

    The accuracy is the fraction of supervised tokens, of all answers, that the model predicts as the most likely.

    Args:
        spec: its objective is not "sft".
        examples: the batch.
        reference: float64 [examples, 2]; the reference's log-probabilities of `JudgedExample.compared`. ORPO has none.
        kl: `losses.kto_kl` of the batch.
    """

    names = ("loss", "accuracy", *losses.METRICS)

    def __init__(
        self, spec: JobSpec, examples: Sequence[JudgedExample], reference: torch.Tensor | None, kl: float = 0.0
    ) -> None:
        self.units = [example.answers for example in examples]
        self._spec, self._examples, self._reference, self._kl = spec, examples, reference, kl
        self._desirable = sum(example.desirable for example in examples)
        counts = [[count_supervised_tokens(answer) for answer in example.answers] for example in examples]
        self._chosen_tokens = sum(count[0] for count in counts)
        self._tokens = sum(map(sum, counts))

    def of_pass(self, unit_indices: Sequence[int], predictions: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
        """As `BatchLoss.of_pass`."""
        sequences = [sequence for index in unit_indices for sequence in self.units[index]]
        log_probs, correct = answer_log_probs(sequences, predictions)
        found = (
            self._labeled(unit_indices, log_probs)
            if self._spec.objective == "kto"
            else self._paired(unit_indices, log_probs)
        )
        accuracy = correct.double()[None] / self._tokens
        return found.loss, torch.cat([found.loss.detach()[None], accuracy, found.metrics])

    def _paired(self, unit_indices: Sequence[int], log_probs: AnswerLogProbs) -> PassLoss:
        spec, pairs = self._spec, len(self.units)
        chosen, rejected = (
            replace(log_probs, sums=log_probs.sums[side::2], tokens=log_probs.tokens[side::2]) for side in (0, 1)
        )
        if spec.objective == "orpo":
            return losses.orpo(chosen, rejected, beta=spec.beta, pairs=pairs, chosen_tokens=self._chosen_tokens)
        reference = self._reference_of(unit_indices, log_probs)
        loss = losses.dpo_sigmoid if spec.dpo_loss == "sigmoid" else losses.dpo_ipo
        return loss(chosen, rejected, reference[:, 0], reference[:, 1], beta=spec.beta, pairs=pairs)

    def _labeled(self, unit_indices: Sequence[int], log_probs: AnswerLogProbs) -> PassLoss:
        desirable = [self._examples[index].desirable for index in unit_indices]
        return losses.kto(
            log_probs,
            self._reference_of(unit_indices, log_probs)[:, 0],
            torch.tensor(desirable, device=log_probs.sums.device),
            kl=self._kl,
            beta=self._spec.beta,
            desirable_weight=self._spec.desirable_weight,
            undesirable_weight=self._spec.undesirable_weight,
            desirable_answers=self._desirable,
            undesirable_answers=len(self.units) - self._desirable,
        )

    def _reference_of(self, unit_indices: Sequence[int], log_probs: AnswerLogProbs) -> torch.Tensor:
        assert self._reference is not None
        return self._reference[list(unit_indices)].to(log_probs.sums.device)


def _mismatched(prompt: EncodedExample, answer: EncodedExample, max_length: int) -> EncodedExample:
    """The prompt of one example with the answer of another, of at most `max_length` tokens."""
    before, after = prompt.tokens[: prompt.prompt_length], answer.tokens[answer.prompt_length :]
    return EncodedExample((*before, *after)[:max_length], prompt.prompt_length, line=prompt.line)
