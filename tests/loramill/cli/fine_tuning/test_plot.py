"""Loss curves, as a picture and as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramill.cli.fine_tuning.plot import integer_ticks, render_text, smoothed, write_png
from loramill.client.models import Job, MetricPoint
from loramill.errors import SetupError
from loramill.types import JobStatus

JOB = Job(
    id="ftjob-1", adapter="acme/support", status=JobStatus.RUNNING, base="b", steps=9, training_file="f", created_at=0.0
)
MANY = [MetricPoint(step=s, train_loss=9 / s, valid_loss=8 / s if s % 3 == 0 else None) for s in range(1, 9)]
FLAT = [MetricPoint(step=s, train_loss=1.0) for s in (1, 2)]


@pytest.mark.parametrize("points", [MANY, FLAT, MANY[:1], [MetricPoint(step=3, valid_loss=1.0)]])
def test_a_curve_is_drawn_as_picture_and_text(tmp_path: Path, points: list[MetricPoint]) -> None:
    write_png(tmp_path / "x.png", JOB, points)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    text = render_text(JOB, points, 60, 14)
    assert "acme/support" in text and "\x1b" not in text
    assert len(text.splitlines()) == 14 and max(map(len, text.splitlines()[1:])) <= 60


def test_the_text_shows_the_curve() -> None:
    rows = render_text(JOB, MANY, 60, 14).splitlines()
    # The loss falls: the points on the left are above those on the right.
    left = next(i for i, row in enumerate(rows[2:]) if row[5:9].strip())
    right = next(i for i, row in enumerate(rows[2:]) if row[50:58].strip())
    assert left < right
    assert sum(row.count("o") for row in rows[1:]) == 2
    assert render_text(JOB, MANY, 60, 14) == "\n".join(rows)


def test_an_unwritable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="can't be written: No such file"):
        write_png(tmp_path / "none" / "x.png", JOB, MANY)


def test_smoothing_begins_at_the_first_loss() -> None:
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    falling = smoothed([4.0, 2.0, 1.0])
    assert falling == pytest.approx([4.0, 7 / 3, 1.0])
    # The smoothed curve does not lag behind a loss that falls evenly.
    straight = [float(loss) for loss in range(100, 0, -1)]
    assert smoothed(straight) == pytest.approx(straight)


@pytest.mark.parametrize(
    ("first", "last", "ticks"),
    [
        (1, 1, [1]),
        (1, 6, [1, 2, 3, 4, 5, 6]),
        (1, 36, [10, 20, 30]),
        (1, 60, [10, 20, 30, 40, 50, 60]),
        (10, 4000, [1000, 2000, 3000, 4000]),
    ],
)
def test_ticks_are_whole_steps(first: int, last: int, ticks: list[int]) -> None:
    assert integer_ticks(first, last) == ticks
    assert smoothed([]) == []
