"""Preference tuning of a tiny base: what is compared, and that passes, kills and starts don't change the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.data.encoding import LabeledAnswer
from loramill.jobs.train import loop
from loramill.jobs.train.batching import count_supervised_tokens
from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.objectives.losses import METRICS
from loramill.jobs.train.objectives.preference import JudgedExample, PreferenceLoss, judged_examples

from ..tiny_training import random_judged, random_pairs, spec_of, tiny_model, train, write_files

OBJECTIVES = ("dpo", "orpo", "kto")


def preference_spec(objective: str, **changes: Any) -> Any:
    return spec_of(objective=objective, **{"learning_rate": 5e-3, "beta": 0.2} | changes)


def run(objective: str, checkpoints: Path, valid: int = 0, **changes: Any) -> list[TrainingProgress]:
    spec = preference_spec(objective, **changes)
    examples, held_out = random_judged(objective, 23), random_judged(objective, valid, seed=1)
    return list(train(tiny_model(), examples, held_out, spec, checkpoints=checkpoints))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_preferences_are_learned(tmp_path, objective):
    found = run(objective, tmp_path, valid=12, steps=40, batch_size=8, eval_every=40, learning_rate=2e-2)
    first, last = found[0], found[-1]
    assert last.loss < first.loss
    assert last.rewards["valid_rewards/accuracies"] > 0.7
    assert last.rewards["valid_rewards/margins"] > 0
    assert {f"{prefix}{name}" for prefix in ("", "valid_") for name in METRICS} == set(last.rewards)
    assert last.rewards.items() <= last.metrics.items()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, math.log(2)),
        ({"dpo_loss": "ipo"}, 6.25),
        ({"method": "dora"}, math.log(2)),
        ({"method": "adalora", "init_rank": 6}, math.log(2)),
        ({"method": "pissa"}, math.log(2)),
    ],
)
def test_the_reference_is_the_model_before_the_first_step(tmp_path, changes, expected):
    first = run("dpo", tmp_path, steps=2, **changes)[0]
    assert first.loss == pytest.approx(expected, abs=1e-4)
    assert [first.rewards[name] for name in METRICS[:3]] == pytest.approx([0, 0, 0], abs=1e-4)
    assert first.grad_norm > 0


def test_a_version_that_training_starts_from_is_its_reference(tmp_path):
    files = export_adapter(tmp_path / "sft", _trained("sft", tmp_path / "sft"), base="tiny")
    start = write_files(tmp_path / "start", files)
    spec = preference_spec("dpo", start_from="v")
    first = next(train(tiny_model(), random_pairs(23), [], spec, checkpoints=tmp_path / "dpo", start_from=start))
    assert first.loss == pytest.approx(math.log(2), abs=1e-4)
    assert abs(first.rewards["rewards/chosen"]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_a_gpu_the_first_step_is_that_of_the_cpu(tmp_path, objective):
    examples, spec = random_judged(objective, 23), preference_spec(objective, steps=2)
    found = [
        next(train(tiny_model().to(device), examples, [], spec, checkpoints=tmp_path / device))
        for device in ("cpu", "cuda")
    ]
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-3)
    assert found[1].grad_norm == pytest.approx(found[0].grad_norm, rel=1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packing", [True, False])
def test_the_size_of_a_pass_does_not_change_the_result(tmp_path, objective, packing):
    results = [
        run(objective, tmp_path / str(tokens), steps=3, micro_tokens=tokens, packing=packing, valid=5, eval_every=3)
        for tokens in (1, 60, 4000)
    ]
    for found in results[1:]:
        for one, other in zip(results[0], found, strict=True):
            same = [
                {**each.metrics, "rewards/accuracies": each.step == 1 or each.rewards["rewards/accuracies"]}
                for each in (one, other)
            ]
            assert same[0] == pytest.approx(same[1], rel=1e-3, abs=1e-5)  # before the first step, rewards are 0
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_job_resumes_bit_exactly_without_the_reference_model(tmp_path, objective, monkeypatch):
    spec = preference_spec(objective, steps=6, checkpoint_every=2, eval_every=3)
    examples, valid = random_judged(objective, 23), random_judged(objective, 6, seed=1)

    def steps(folder: Path) -> Any:
        return train(tiny_model(), examples, valid, spec, checkpoints=folder)

    expected = [progress.metrics for progress in steps(tmp_path / "whole")]
    begun = steps(tmp_path / "killed")
    for _ in range(3):
        next(begun)
    begun.close()
    prepared = []
    monkeypatch.setattr(loop.TrainingRun, "_score", _counted(loop.TrainingRun._score, prepared))
    resumed = [progress.metrics for progress in steps(tmp_path / "killed")]
    assert resumed == expected[3:]
    assert len(prepared) == (4 if objective == "kto" else 0)  # of three steps and a validation
    exported = [export_adapter(tmp_path / name, spec, base="tiny") for name in ("whole", "killed")]
    assert exported[0] == exported[1]


def test_batches_without_good_answers_have_no_reward_of_them(tmp_path):
    examples = [LabeledAnswer(pair.rejected, False) for pair in random_pairs(8)]
    (progress,) = train(tiny_model(), examples, [], preference_spec("kto", steps=1), checkpoints=tmp_path)
    assert set(progress.rewards) == {"rewards/rejected", "rewards/accuracies"}


@given(st.integers(2, 40), st.integers(0, 3), st.sampled_from([14, 100]))
def test_each_answer_is_the_mismatched_one_of_one_other_prompt(count, seed, max_length):
    labeled = [each for each in random_judged("kto", count) if isinstance(each, LabeledAnswer)]
    spec = preference_spec("kto", seed=seed, max_length=max_length)
    judged = judged_examples(labeled, spec)
    assert judged == judged_examples(labeled, spec)
    for own, each in zip(labeled, judged, strict=True):
        prompt = own.answer.prompt_length
        assert each.mismatched is not None and each.mismatched.tokens[:prompt] == own.answer.tokens[:prompt]
        assert prompt < len(each.mismatched.tokens) <= max_length
    if max_length == 100:
        mismatched = [each.mismatched for each in judged if each.mismatched is not None]
        others = [each.tokens[each.prompt_length :] for each in mismatched]
        answers = [each.answer.tokens[each.answer.prompt_length :] for each in labeled]
        assert sorted(others) == sorted(answers)
        assert all(other != answer for other, answer in zip(others, answers, strict=True))


@settings(max_examples=40)
@given(st.data())
def test_a_batch_is_the_sum_of_its_passes(data):
    objective = data.draw(st.sampled_from(OBJECTIVES))
    spec = preference_spec(objective, dpo_loss=data.draw(st.sampled_from(["sigmoid", "ipo"])))
    count = data.draw(st.integers(1, 6))
    examples = judged_examples(random_judged(objective, count, seed=count), spec)
    generator = torch.Generator().manual_seed(count)
    reference = -torch.rand(count, 2, generator=generator, dtype=torch.float64) * 9
    loss = PreferenceLoss(spec, examples, reference, kl=0.3)
    values = [_random_log_probs(example, generator) for example in examples]
    cut = data.draw(st.integers(0, count))
    order = data.draw(st.permutations(range(count)))
    parts = [part for part in (order[:cut], order[cut:]) if part]
    sums = [_of_pass(loss, part, values) for part in (range(count), *parts)]
    torch.testing.assert_close(sums[0], sum(sums[1:]), equal_nan=True)


def _of_pass(loss: PreferenceLoss, indices: Sequence[int], values: Sequence[torch.Tensor]) -> torch.Tensor:
    log_probs = torch.cat([values[index] for index in indices])
    value, sums = loss.of_pass(indices, SimpleNamespace(log_probs=lambda: (log_probs, log_probs > -1)))
    assert sums[0] == value
    assert len(sums) == len(loss.names)
    return sums


def _random_log_probs(example: JudgedExample, generator: torch.Generator) -> torch.Tensor:
    return -torch.rand(sum(map(count_supervised_tokens, example.answers)), generator=generator) * 3


def _trained(objective: str, folder: Path) -> Any:
    spec = spec_of(steps=3)
    for _ in train(tiny_model(), [pair.chosen for pair in random_pairs(23)], [], spec, checkpoints=folder):
        pass
    return spec


def _counted(method: Any, calls: list[int]) -> Any:
    def score(self: Any, answers: Any) -> Any:
        calls.append(len(answers))
        return (yield from method(self, answers))

    return score
