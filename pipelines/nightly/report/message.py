"""The message about a nightly run, in the format of Slack's webhooks. Pure functions.

https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks: `text` is what notifications and other
services show, `blocks` what Slack shows. A section has at most 3000 characters, a header 150.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from loramill.pipelines.nightly.outcome import UNSUCCESSFUL, Verdict
from loramill.pipelines.nightly.report.schema import AdapterReport, NightlyReport
from loramill.pipelines.nightly.rollouts.overview import RolloutOverview
from loramill.plural import counted
from loramill.types import RolloutOutcome

NotifyOn = Literal["always", "changes", "problems"]
#: Adapters that a message names per verdict, and characters of a reason.
_NAMED, _REASON, _SECTION = 10, 160, 2900
#: Verdicts after which nothing changed and nothing failed.
_QUIET = (Verdict.HELD, Verdict.REJECTED, Verdict.WAITING, Verdict.SKIPPED, Verdict.RUNNING, Verdict.DELETED)


def should_notify(report: NightlyReport, on: NotifyOn) -> bool:
    """Whether a run is reported.

    Args:
        report: the run.
        on: "always": each run; "changes": runs in which an adapter was promoted, waits for approval or failed;
            "problems": runs in which something failed or was interrupted. Both: also if a version was rolled back.
    """
    if on == "always" or not report.succeeded or _rolled_back(report):
        return True
    return on == "changes" and any(verdict not in _QUIET for verdict in report.totals.verdicts)


def slack_message(report: NightlyReport, where: str) -> dict[str, Any]:
    """The message.

    Args:
        report: the run.
        where: path or URL of the page.
    """
    mark = "✅" if report.succeeded else "❌"
    summary = f"{mark} {report.summary}"
    sections = [_escaped(report.interrupted)] if report.interrupted else []
    for verdict in report.totals.verdicts:
        found = [each for each in report.adapters if each.verdict is verdict]
        if verdict not in (Verdict.WAITING, Verdict.SKIPPED, Verdict.RUNNING):
            sections.append(_section(verdict, found))
        if verdict is Verdict.AWAITING:
            sections[-1] += f"\n`loramill nightly approve {report.run} --all` approves all of them"
    if undone := _rolled_back(report):
        lines = [f"• {_escaped(each.adapter)}: {_escaped(_cut(each.reason, _REASON))}" for each in undone[:_NAMED]]
        sections.append("\n".join([f"*Rolled back: {counted(len(undone), 'adapter')}*", *lines]))
    if report.totals.quarantined:
        sections.append(f"{counted(report.totals.quarantined, 'row')} of new data in quarantine")
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": _cut(f"{mark} Nightly run", 150)}},
        *(
            {"type": "section", "text": {"type": "mrkdwn", "text": _cut(text, _SECTION)}}
            for text in _sections(report, sections)
        ),
        {
            "type": "context",
            "elements": [{"type": "mrkdwn", "text": _cut(f"{report.run}: {_escaped(where)}", _SECTION)}],
        },
    ]
    return {"text": _cut(_escaped(summary), _SECTION), "blocks": blocks}


def _rolled_back(report: NightlyReport) -> list[RolloutOverview]:
    return [each for each in report.rollouts if each.state == RolloutOutcome.ROLLED_BACK]


def _sections(report: NightlyReport, sections: Sequence[str]) -> list[str]:
    return [_escaped(report.summary), *sections]


def _section(verdict: Verdict, found: Sequence[AdapterReport]) -> str:
    """A verdict with its adapters; problems have their reasons."""
    named = found[:_NAMED]
    if verdict in UNSUCCESSFUL:
        lines = [
            f"• {_escaped(each.adapter)}: {_escaped(_cut(each.reason.partition(chr(10))[0], _REASON))}"
            for each in named
        ]
    else:
        lines = [", ".join(_escaped(each.adapter) + _gain(each) for each in named)]
    more = [f"and {len(found) - len(named)} more"] if len(found) > len(named) else []
    return "\n".join([f"*{str(verdict).capitalize()}*", *lines, *more])


def _gain(adapter: AdapterReport) -> str:
    return "" if adapter.gain is None else f" ({adapter.gain.gain:+.3f})"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _escaped(text: str) -> str:
    """Text without Slack's markup for links and mentions."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
