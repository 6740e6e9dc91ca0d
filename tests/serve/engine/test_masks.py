"""Answers under a mask contain only tokens that it allows, whatever happens, and other answers are unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramill.errors import InvalidRequest
from loramill.serve.engine import FinishReason, SamplingParams
from loramill.serve.engine.sampling.sampler import Sampler, sample

VOCABULARY = 101
STOP = 7


class Steps:
    """Allows at each step the tokens of a residue class of the answer's length; it ends after `count`, if at all."""

    def __init__(self, count: int | None = None, breaks: int | None = None, may_stop: range = range(0)) -> None:
        self.taken: list[int] = []
        self._count, self._breaks, self._may_stop = count, breaks, may_stop

    @property
    def finished(self) -> bool:
        return len(self.taken) == self._count

    @property
    def error(self) -> InvalidRequest | None:
        return InvalidRequest("too complex") if len(self.taken) == self._breaks else None

    def allowed_bits(self) -> np.ndarray:
        tokens = np.arange(VOCABULARY) % 5 == len(self.taken) % 5
        tokens[STOP] = len(self.taken) in self._may_stop
        return np.packbits(tokens, bitorder="little")

    def accept(self, token: int) -> None:
        assert is_allowed(self, token) and token != STOP
        self.taken.append(token)


def is_allowed(mask: Steps, token: int) -> bool:
    return bool(np.unpackbits(mask.allowed_bits(), bitorder="little")[token])


def fits(tokens: list[int]) -> bool:
    return STOP not in tokens and all(token % 5 == position % 5 for position, token in enumerate(tokens))


SAMPLINGS = {
    "greedy": {},
    "drawn": {"temperature": 1.5, "seed": 3},
    "few": {"temperature": 1.0, "seed": 3, "top_k": 3, "top_p": 0.4, "min_p": 0.1},
    "penalized": {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0},
    "biased": {"logit_bias": tuple((token, 50.0) for token in range(0, 101, 5))},
    "all banned": {"logit_bias": tuple((token, float("-inf")) for token in range(101)), "temperature": 1.0, "seed": 1},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_only_tokens_that_the_mask_allows_are_sampled(drive, prompts, name):
    driver = drive()
    driver.submit("it", prompts["lora"], "lora", mask=Steps, max_tokens=30, stop_ids=(STOP,), **SAMPLINGS[name])
    answer = driver.finish()["it"]
    assert len(answer) == 30 and fits(answer)
    assert driver.answers["it"].last.finish_reason is FinishReason.LENGTH


def test_the_mask_ends_its_answer_with_its_last_token(drive):
    driver = drive()
    driver.submit("it", [1, 2], mask=lambda: Steps(count=4), max_tokens=4, logprobs=1)
    answer = driver.finish()["it"]
    assert len(answer) == 4 and fits(answer)
    assert driver.answers["it"].last.finish_reason is FinishReason.STOP
    assert [entry.token for entry in driver.answers["it"].logprobs] == answer


@pytest.mark.parametrize(("min_tokens", "count"), [(0, 3), (6, 6), (20, 9)])
def test_a_stop_token_comes_where_mask_and_min_tokens_allow_it(drive, min_tokens, count):
    # From its third token on it may stop; after the ninth it must.
    driver = drive()
    sampling = {"max_tokens": 20, "stop_ids": (STOP,), "logit_bias": ((STOP, 100.0),), "min_tokens": min_tokens}
    driver.submit("it", [1], mask=lambda: Steps(count=9, may_stop=range(3, 99)), **sampling)
    answer = driver.finish()["it"]
    assert len(answer) == count and fits(answer)
    assert driver.answers["it"].last.finish_reason is FinishReason.STOP


def test_log_probabilities_are_the_models_own(drive, tiny_reference):
    driver = drive()
    driver.submit("it", [5, 6, 8], mask=Steps, max_tokens=6, logprobs=2)
    answer = driver.finish()["it"]
    expected = tiny_reference([5, 6, 8, *answer])
    for position, entry in enumerate(driver.answers["it"].logprobs):
        assert entry.logprob == pytest.approx(float(expected[2 + position, answer[position]]), abs=1e-4)


def test_each_answer_has_a_mask_of_its_own(drive):
    made: list[Steps] = []

    def make() -> Steps:
        made.append(Steps(count=5 + len(made)))
        return made[-1]

    driver = drive()
    driver.submit("it", [1, 2, 3], mask=make, n=3, temperature=1.0, seed=1, max_tokens=20)
    answers = driver.finish()
    assert [len(answer) for answer in answers.values()] == [5, 6, 7]
    assert sorted(answers.values(), key=len) == [mask.taken for mask in made]


def test_a_preempted_answer_resumes_unchanged(drive, prompts, expected):
    sampling = {"max_tokens": 40, "temperature": 1.0, "seed": 4, "mask": Steps}
    alone = drive()
    alone.submit("it", prompts["all"], "all", **sampling)
    answer = alone.finish()["it"]
    crowd = drive(kv_tokens=160, max_batch_tokens=40)
    crowd.warm(*prompts)
    crowd.submit("it", prompts["all"], "all", **sampling)
    crowd.submit("other", prompts["lora"], "lora", tenant="other", **sampling)
    crowd.submit_all(prompts)
    answers = crowd.finish()
    assert crowd.engine.stats.preemptions > 0
    assert answers["it"] == answer and fits(answers["other"])
    # Answers without a mask are the same as alone.
    assert {name: answers[name] for name in expected} == expected


@pytest.mark.parametrize("breaks", [0, 3])
def test_a_mask_that_breaks_ends_only_its_own_answer(drive, prompts, expected, breaks):
    driver = drive()
    driver.submit_all(prompts)
    driver.submit("it", [1], mask=lambda: Steps(breaks=breaks))
    answers = driver.finish()
    last = driver.answers["it"].last
    assert (last.finish_reason, type(last.error), len(answers.pop("it"))) == (
        FinishReason.ERROR,
        InvalidRequest,
        breaks,
    )
    assert answers == expected


def test_a_model_that_rules_out_every_allowed_token_is_broken():
    sampler = Sampler(SamplingParams(9, logit_bias=((5, 9.0),)), (), mask=Steps())
    logits = torch.zeros(1, VOCABULARY)
    logits[0, ::5] = -torch.inf
    assert sample(logits, [sampler]) == [None]
