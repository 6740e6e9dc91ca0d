"""Losses of preference tuning at values that are known, and at the ends of their range."""

from __future__ import annotations

import math

import pytest
import torch

from loramill.jobs.train.objectives import losses
from loramill.jobs.train.objectives.losses import METRICS, AnswerLogProbs, PassLoss


def answers(*sums: float, tokens: int = 1) -> AnswerLogProbs:
    values = torch.tensor(sums, dtype=torch.float64, requires_grad=True)
    return AnswerLogProbs(values, torch.full((len(sums),), tokens))


def metrics(found: PassLoss) -> dict[str, float]:
    return dict(zip(METRICS, found.metrics.tolist(), strict=True))


def test_tokens_are_summed_by_answer():
    found = losses.sum_by_answer(torch.tensor([1.0, 2.0, 4.0, 8.0]), [3, 1])
    assert found.sums.tolist() == [7, 8]
    assert found.means.tolist() == pytest.approx([7 / 3, 8])


@pytest.mark.parametrize(("loss_of", "expected"), [("dpo_sigmoid", math.log(2)), ("dpo_ipo", 25.0)])
def test_a_policy_that_is_its_reference_has_no_reward(loss_of, expected):
    chosen, rejected = answers(-3.0, -5.0), answers(-4.0, -1.0)
    found = getattr(losses, loss_of)(chosen, rejected, chosen.sums.detach(), rejected.sums.detach(), beta=0.1, pairs=2)
    assert found.loss.item() == pytest.approx(expected)
    assert metrics(found) == dict.fromkeys(METRICS, 0.0)
    found.loss.backward()
    assert (chosen.sums.grad < 0).all()
    assert (rejected.sums.grad > 0).all()


def test_rewards_are_log_ratios_times_beta():
    reference = torch.tensor([-2.0, -2.0], dtype=torch.float64)
    found = losses.dpo_sigmoid(answers(-1.0, -4.0), answers(-2.0, -3.0), reference, reference, beta=0.5, pairs=4)
    assert metrics(found) == pytest.approx(dict(zip(METRICS, [-0.125, -0.125, 0.0, 0.25], strict=True)))


def test_odds_of_certain_answers_are_finite():
    chosen, rejected = answers(0.0, -800.0), answers(-1.0, 0.0)
    found = losses.orpo(chosen, rejected, beta=0.1, pairs=2, chosen_tokens=2)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert torch.isfinite(chosen.sums.grad).all()
    assert torch.isfinite(rejected.sums.grad).all()


def test_good_answers_gain_and_bad_answers_lose():
    given, reference = answers(-2.0, -2.0, -9.0), torch.tensor([-4.0, -4.0, -4.0], dtype=torch.float64)
    desirable = torch.tensor([True, False, False])
    found = losses.kto(
        given,
        reference,
        desirable,
        kl=1.0,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        desirable_answers=1,
        undesirable_answers=2,
    )
    assert metrics(found) == pytest.approx(dict(zip(METRICS, [0.2, -0.15, 0.35, 2 / 3], strict=True)))
    found.loss.backward()
    assert (given.sums.grad < 0).tolist() == desirable.tolist()


@pytest.mark.parametrize(("policy", "expected"), [([-1.0, -2.0], 1.5), ([-9.0, -2.0], 0.0)])
def test_the_reference_point_of_kto_is_not_below_zero(policy, expected):
    reference = torch.tensor([-3.0, -3.0], dtype=torch.float64)
    assert losses.kto_kl(torch.tensor(policy, dtype=torch.float64), reference) == expected
