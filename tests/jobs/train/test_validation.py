"""Validation during training: its steps, its loss, early stops, and the weights that become the version."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai.types.fine_tuning.jobs.fine_tuning_job_checkpoint import Metrics
from peft import PeftModel

from loramill.errors import ArtifactMissing
from loramill.jobs.train.export.adapter import export_adapter

from .tiny_training import random_examples, reference_loss, spec_of, tiny_model, train, train_and_export, write_files

HELD_OUT = random_examples(4, seed=1, weighed=True)


@pytest.mark.parametrize(
    ("every", "checked"), [(None, [4, 8, 10]), (3, [3, 6, 9, 10]), (1, list(range(1, 11))), (50, [10])]
)
def test_runs_at_the_specs_interval_and_at_the_end(tmp_path: Path, every: int | None, checked: list[int]) -> None:
    spec = spec_of(steps=10, checkpoint_every=4, eval_every=every)
    points = list(train(tiny_model(), random_examples(23), HELD_OUT, spec, checkpoints=tmp_path))
    assert [point.step for point in points if point.valid_loss is not None] == checked
    assert [point.step for point in points if point.valid_accuracy is not None] == checked
    assert all(
        point.valid_loss is None
        for point in train(tiny_model(), random_examples(9), [], spec, checkpoints=tmp_path / "none")
    )


def test_its_loss_is_that_of_the_exported_weights(tmp_path: Path) -> None:
    """At every validation the last checkpoint holds the very weights that were validated."""
    for point in train(
        tiny_model(), random_examples(23), HELD_OUT, spec_of(eval_every=2), checkpoints=tmp_path / "job"
    ):
        if point.valid_loss is None:
            continue
        files = export_adapter(tmp_path / "job", spec_of(eval_every=2), base="tiny", best=False)
        plain = PeftModel.from_pretrained(tiny_model(), write_files(tmp_path / str(point.step), files))
        loss, accuracy = reference_loss(plain, HELD_OUT)
        assert point.valid_loss == pytest.approx(loss.item(), rel=1e-5)
        assert point.valid_accuracy == pytest.approx(accuracy, abs=1e-6)


def test_the_version_has_the_weights_that_keep_selects(tmp_path: Path) -> None:
    spec = spec_of(steps=12, eval_every=1, checkpoint_every=5, learning_rate=0.1, schedule="constant", keep="best")
    weights, losses, best = [], [], []
    for point in train(tiny_model(), random_examples(8), HELD_OUT, spec, checkpoints=tmp_path / "best"):
        with pytest.raises(ArtifactMissing, match="the end") if point.step < 12 else pytest.MonkeyPatch.context():
            export_adapter(tmp_path / "best", spec, base="tiny")
        weights.append(export_adapter(tmp_path / "best", spec, base="tiny", best=False))
        losses.append(point.valid_loss)
        best.append(point.is_best)
    lowest = min(range(12), key=losses.__getitem__)
    assert 0 < lowest < 9  # otherwise the test shows nothing
    assert best == [losses[step] < min(losses[:step], default=9e9) for step in range(12)]
    assert export_adapter(tmp_path / "best", spec, base="tiny") == weights[lowest]
    assert len(list((tmp_path / "best").iterdir())) == 3  # the last two, and the best
    assert (
        train_and_export(
            tiny_model(), spec.model_copy(update={"keep": "last"}), tmp_path / "last", train=random_examples(8)
        )
        == weights[-1]
    )


def test_an_early_stop_ends_the_job_with_its_best_weights(tmp_path: Path) -> None:
    spec = spec_of(steps=40, eval_every=2, patience=2, learning_rate=0.1, schedule="constant", keep="best")
    points = list(train(tiny_model(), random_examples(8), HELD_OUT, spec, checkpoints=tmp_path))
    losses = [point.valid_loss for point in points if point.valid_loss is not None]
    assert points[-1].step < 40 and points[-1].total_steps == 40
    assert losses.index(min(losses)) == len(losses) - 3
    assert list(train(tiny_model(), random_examples(8), HELD_OUT, spec, checkpoints=tmp_path)) == []
    best = write_files(tmp_path / "best", export_adapter(tmp_path, spec, base="tiny"))
    loss, _ = reference_loss(PeftModel.from_pretrained(tiny_model(), best), HELD_OUT)
    assert loss.item() == pytest.approx(min(losses), rel=1e-5)


def test_validations_at_the_rungs_of_a_sweep_do_not_count_toward_patience(tmp_path: Path) -> None:
    spec = spec_of(steps=40, eval_every=2, patience=2, learning_rate=0.1, schedule="constant", keep="best")
    fields = {"checkpoints": tmp_path, "validated_steps": range(1, 41)}
    points = list(train(tiny_model(), random_examples(8), HELD_OUT, spec, **fields))
    losses = {point.step: point.valid_loss for point in points}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == points[-1].step < 40
    assert sum(step % 2 == 0 for step in losses if step > best) == 2


def test_metrics_have_openais_names(tmp_path: Path) -> None:
    points = list(train(tiny_model(), random_examples(23), HELD_OUT, spec_of(), checkpoints=tmp_path))
    assert set(points[-1].metrics) == set(Metrics.model_fields)
    assert set(points[0].metrics) == {"step", "train_loss", "train_mean_token_accuracy"}
    assert Metrics.model_validate(points[-1].metrics, strict=False).valid_loss == points[-1].valid_loss
    assert 0 < points[-1].accuracy <= 1
