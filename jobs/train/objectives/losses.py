"""Losses of preference tuning, as functions of log-probabilities of whole answers: DPO, IPO, ORPO, KTO.

The log-probability of an answer is the sum over its supervised tokens (the answer and its end, not the prompt) of
log p(token | all tokens before it), in nats. A loss is an average over the batch of one optimizer step, and a step may
take several passes: each function gets the answers of one pass and the numbers of the whole batch, and returns what
the pass adds to the batch's loss and metrics. Both sides of a pair are in one pass.

The implied reward of an answer is beta * (log p - log p_reference): the reference is the model before training.
Log-probabilities are float64: a sum of hundreds of nats has an error of 3e-5 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

#: Names of `PassLoss.metrics`, as in TRL.
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

#: The largest mean log-probability whose odds are computed: at 0 they are infinite, and their gradient is NaN.
_MAX_MEAN_LOG_PROB = -1e-7


@dataclass(frozen=True, slots=True)
class PassLoss:
    """What one pass adds to the loss and the metrics of its batch.

    Attributes:
        loss: float64 scalar, with a gradient.
        metrics: float64 [4], of `METRICS`, without a gradient. Rewards are in nats; an accuracy is a fraction.
    """

    loss: torch.Tensor
    metrics: torch.Tensor


@dataclass(frozen=True, slots=True)
class AnswerLogProbs:
    """Answers of one pass.

    Attributes:
        sums: float64 [n]; the log-probability of each answer, in nats.
        tokens: int64 [n]; the number of its supervised tokens, at least 1.
    """

    sums: torch.Tensor
    tokens: torch.Tensor

    @property
    def means(self) -> torch.Tensor:
        """float64 [n]; nats per token."""
        return self.sums / self.tokens


def sum_by_answer(log_probs: torch.Tensor, tokens: Sequence[int]) -> AnswerLogProbs:
    """Sums the log-probabilities of supervised tokens by answer.

    Args:
        log_probs: [S], in the order of the answers.
        tokens: number of supervised tokens of each answer; their sum is S.
    """
    sums = torch.stack([part.sum() for part in torch.split(log_probs.double(), list(tokens))])
    return AnswerLogProbs(sums, torch.tensor(tokens, device=log_probs.device))


def dpo_sigmoid(
    chosen: AnswerLogProbs,
    rejected: AnswerLogProbs,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float,
    pairs: int,
) -> PassLoss:
    """DPO: -log sigmoid(reward of chosen - reward of rejected), averaged over pairs.

    Rafailov et al. 2023, "Direct Preference Optimization", equation 7; no label smoothing.

    Args:
        chosen, rejected: the n pairs of the pass.
        reference_chosen, reference_rejected: float64 [n]; the reference's log-probabilities of the same answers.
        beta: above 0; the higher, the closer the model stays to the reference.
        pairs: number of pairs in the batch.
    """
    chosen_rewards = beta * (chosen.sums - reference_chosen)
    rejected_rewards = beta * (rejected.sums - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PassLoss(losses.sum() / pairs, _pair_metrics(chosen_rewards, rejected_rewards, pairs))


def dpo_ipo(
    chosen: AnswerLogProbs,
    rejected: AnswerLogProbs,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float,
    pairs: int,
) -> PassLoss:
    """IPO: (h - 1 / (2 beta))^2, averaged over pairs, where h is the difference of both sides' log-ratios per token.

    Azar et al. 2024, "A General Theoretical Paradigm to Understand Learning from Human Preferences", equation 17, whose
    tau is `beta`. Log-ratios are divided by the tokens of their answer, as in TRL, which asked the authors: as sums,
    the loss would grow with the square of the length. Arguments and metrics are those of `dpo_sigmoid`.
    """
    chosen_ratios, rejected_ratios = chosen.sums - reference_chosen, rejected.sums - reference_rejected
    gaps = chosen_ratios / chosen.tokens - rejected_ratios / rejected.tokens
    losses = (gaps - 1 / (2 * beta)) ** 2
    return PassLoss(losses.sum() / pairs, _pair_metrics(beta * chosen_ratios, beta * rejected_ratios, pairs))


def orpo(chosen: AnswerLogProbs, rejected: AnswerLogProbs, *, beta: float, pairs: int, chosen_tokens: int) -> PassLoss:
    """ORPO: the cross-entropy of the chosen answers, and beta * -log sigmoid(log odds ratio). It has no reference.

    Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", equations 6 and 7, whose
    lambda is `beta`. odds(y) = p / (1 - p), where log p is the mean log-probability of the answer's tokens. The
    cross-entropy is averaged over the batch's chosen tokens, the other term over its pairs. TRL adds the cross-entropy
    of the prompts, which this one does not.

    Args:
        chosen, rejected: the n pairs of the pass.
        beta: above 0; the weight of the odds ratio.
        pairs: number of pairs in the batch.
        chosen_tokens: number of supervised tokens of all chosen answers of the batch.

    Returns:
        The rewards in the metrics are beta times the mean log-probabilities, as in TRL.
    """
    log_odds_ratios = _log_odds(chosen.means) - _log_odds(rejected.means)
    loss = -chosen.sums.sum() / chosen_tokens - beta * F.logsigmoid(log_odds_ratios).sum() / pairs
    return PassLoss(loss, _pair_metrics(beta * chosen.means, beta * rejected.means, pairs))


def kto(
    answers: AnswerLogProbs,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    *,
    kl: float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    desirable_answers: int,
    undesirable_answers: int,
) -> PassLoss:
    """KTO: weight * (1 - sigmoid(z)), averaged over answers.

    z is reward - beta * kl of a desirable answer, and beta * kl - reward of an undesirable one.
    Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equation 8.

    Args:
        answers: the n answers of the pass.
        reference: float64 [n]; the reference's log-probabilities of the same answers.
        desirable: bool [n].
        kl: `kto_kl` of the batch.
        beta: above 0; the higher, the closer the model stays to the reference.
        desirable_weight, undesirable_weight: weights of the losses of the two kinds of answers.
        desirable_answers, undesirable_answers: numbers of them in the batch.

    Returns:
        Of the metrics, rewards are averaged over the answers of one kind; they and the margin are NaN if the batch has
        none. The accuracy is the fraction of answers for which z is above 0.
    """
    ratios = answers.sums - reference
    gains = torch.where(desirable, ratios - kl, kl - ratios)
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(gains)
    count = desirable_answers + undesirable_answers
    rewards, right = beta * ratios.detach(), (gains.detach() > 0).double().sum() / count
    chosen = rewards[desirable].sum() / (desirable_answers or math.nan)
    rejected = rewards[~desirable].sum() / (undesirable_answers or math.nan)
    loss = (weights * (1 - torch.sigmoid(beta * gains))).sum() / count
    return PassLoss(loss, torch.stack([chosen, rejected, chosen - rejected, right]))


def kto_kl(policy: torch.Tensor, reference: torch.Tensor) -> float:
    """KTO's reference point: the mean log-ratio of answers to *other* prompts, at least 0, in nats.

    It estimates how far the model has moved from the reference on answers that it is not trained on, and has no
    gradient (Ethayarajh et al. 2024, below equation 8; as in TRL, where a batch's answers are shifted by one).

    Args:
        policy, reference: float64 [n]; log-probabilities of the batch's mismatched answers.
    """
    return max(0.0, (policy - reference).mean().item())


def _log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p."""
    x = log_probs.clamp(max=_MAX_MEAN_LOG_PROB)
    # The more exact of two formulas for log(1 - p), as in TRL.
    return x - torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def _pair_metrics(chosen: torch.Tensor, rejected: torch.Tensor, pairs: int) -> torch.Tensor:
    chosen, rejected = chosen.detach(), rejected.detach()
    right = (chosen > rejected).double()
    return torch.stack([chosen.sum(), rejected.sum(), (chosen - rejected).sum(), right.sum()]) / pairs
