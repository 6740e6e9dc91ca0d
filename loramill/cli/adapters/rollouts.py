"""Prints rollouts as nightly runs report them, and what the answers of a version were like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramill.cli.format import print_message, print_table, short_version, styled_status
from loramill.plural import counted
from loramill.types import RolloutKind


def print_rollouts(rollouts: Sequence[Any]) -> None:
    """Prints a table of rollouts, each a `RolloutOverview`, with numbers and reasons, if there are any."""
    if not rollouts:
        return
    print_message("")
    rows = [
        (
            each.adapter,
            _describe(each),
            styled_status(each.state),
            _signals(each.tried),
            _signals(each.compared),
            each.reason,
        )
        for each in rollouts
    ]
    print_table(("ADAPTER", "ROLLOUT", "STATE", "ITS ANSWERS", "COMPARED WITH", "REASON"), rows, empty="")


def _describe(rollout: Any) -> str:
    share = "" if rollout.kind is RolloutKind.WATCH else f", {rollout.share:.0%}"
    return f"{rollout.kind} of {short_version(rollout.tried.version)}{share}"


def _signals(side: Any) -> str:
    if side is None:
        return "-"
    return describe_answers(side.requests, side.failed, side.empty, side.cut, side.bad, side.seconds)


def describe_answers(requests: int, failed: int, empty: int, cut: int, bad: int, seconds: float | None = None) -> str:
    """Returns what the answers of one version were like: "7 requests (2 failed, 1.2 s)"."""
    counts = {"failed": failed, "empty": empty, "cut": cut, "rated bad": bad}
    parts = [f"{number} {name}" for name, number in counts.items() if number]
    parts += [] if seconds is None else [f"{seconds:.2g} s"]
    return counted(requests, "request") + (f" ({', '.join(parts)})" if parts else "")
