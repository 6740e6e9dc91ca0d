"""The table of rollouts in `nightly show` and `nightly status`."""

from __future__ import annotations

import pytest

from loramill.cli.adapters.rollouts import print_rollouts
from loramill.pipelines.nightly.rollouts.overview import RolloutOverview, VersionSignals
from loramill.types import RolloutKind


def test_rollouts_are_printed_with_numbers_and_reasons(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    tried = VersionSignals(version="b" * 64, requests=60, failed=1, empty=57, cut=0, good=0, bad=2, seconds=0.21)
    watch = RolloutOverview(
        adapter="acme/a",
        kind=RolloutKind.WATCH,
        share=1.0,
        state="rolled back",
        reason="empty answers rose from 0.0% to 96.6%",
        run=None,
        started_at=1.0,
        ends_at=2.0,
        ended_at=1.5,
        tried=tried,
        compared=VersionSignals(version="a" * 64, requests=1, failed=0, empty=0, cut=0, good=0, bad=0, seconds=None),
    )
    canary = watch.model_copy(update={"kind": RolloutKind.CANARY, "share": 0.1, "state": "under way", "compared": None})
    print_rollouts([watch, canary])
    _, first, second = capsys.readouterr().out.splitlines()
    for part in (
        "watch of bbbbbbbbbbbb",
        "60 requests (1 failed, 57 empty, 2 rated bad, 0.21 s)",
        "1 request ",
        "to 96.6%",
    ):
        assert part in first
    assert "canary of bbbbbbbbbbbb, 10%" in second and "under way" in second
    print_rollouts([])
    assert capsys.readouterr().out == ""
