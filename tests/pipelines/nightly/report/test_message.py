"""The message about a run: short, in Slack's format, and sent only when the definition wants it."""

from __future__ import annotations

import json

import pytest

from loramill.pipelines.nightly.report.message import NotifyOn, should_notify, slack_message
from loramill.pipelines.nightly.report.schema import NightlyReport
from loramill.pipelines.nightly.report.summarize import summarize
from loramill.types import NightlyStep, StepStatus

from .runs import awaiting, complete, failed, records, rollout, step


def report_of(*steps: list[NightlyStep], **changes) -> NightlyReport:
    return summarize(records([each for group in steps for each in group], **changes))


def texts(message: dict) -> list[str]:
    return [block["text"]["text"] for block in message["blocks"] if "text" in block]


def test_the_message_has_counts_names_and_the_place_of_the_report() -> None:
    steps = [complete("acme/a"), complete("acme/b", promote=False), failed("bolt/c", "The loss is NaN.\nline two")]
    message = slack_message(report_of(*steps), "/srv/nightly-report.html")
    assert message["text"] == "❌ Nightly run: 1 promoted, 1 held, 1 failed (bolt/c at train)."
    title, summary, bad, held, promoted, rows = texts(message)
    assert title == "❌ Nightly run" and summary == message["text"].removeprefix("❌ ")
    assert bad.splitlines()[0] == "*Failed*" and bad.splitlines()[1].startswith("• bolt/c: train: The loss is NaN.")
    assert (held, promoted) == ("*Held*\nacme/b (+0.200)", "*Promoted*\nacme/a (+0.200)")
    assert rows == "6 rows of new data in quarantine"
    assert message["blocks"][-1]["elements"][0]["text"] == "nightly-1: /srv/nightly-report.html"


def test_the_message_says_how_many_wait_for_approval_and_how_to_approve() -> None:
    report = report_of(awaiting("acme/a"), awaiting("acme/b", 0.1), complete("acme/c"))
    assert [should_notify(report, on) for on in ("problems", "changes", "always")] == [False, True, True]
    message = slack_message(report, "x")
    assert message["text"] == "✅ Nightly run: 1 promoted, 2 awaiting approval."
    assert texts(message)[2] == (
        "*Awaiting approval*\nacme/a (+0.200), acme/b (+0.100)\n"
        "`loramill nightly approve nightly-1 --all` approves all of them"
    )


def test_a_message_about_hundreds_of_adapters_stays_within_slacks_limits() -> None:
    steps = [failed(f"acme/{'long' * 15}{number}", "x" * 500) for number in range(300)]
    message = slack_message(report_of(*steps, interrupted="y" * 9000), "z" * 9000)
    assert len(message["blocks"]) <= 50 and all(len(each) <= 3000 for each in texts(message))
    assert len(message["text"]) <= 3000 and "and 290 more" in texts(message)[3]
    assert len(json.dumps(message)) < 20_000


def test_slacks_markup_in_what_tenants_wrote_is_escaped() -> None:
    message = slack_message(report_of(failed("acme/a", "<!channel> & <http://x|y>")), "/tmp/<b>")
    assert "<" not in json.dumps(message) and "&lt;!channel&gt; &amp; &lt;http" in texts(message)[2]


@pytest.mark.parametrize(
    ("steps", "on"),
    [
        (failed("acme/a"), "problems"),
        (complete("acme/a"), "changes"),
        (awaiting("acme/a"), "changes"),
        (complete("acme/a", promote=False), "always"),
        ([], "always"),
    ],
)
def test_runs_are_reported_from_the_level_of_their_event(steps: list[NightlyStep], on: NotifyOn) -> None:
    levels: tuple[NotifyOn, ...] = ("problems", "changes", "always")
    report = report_of(steps)
    assert [should_notify(report, each) for each in levels] == [
        levels.index(each) >= levels.index(on) for each in levels
    ]


def test_an_interrupted_run_is_a_problem() -> None:
    waiting = step("acme/a", "collect", {"waiting": "add more"}, StepStatus.PENDING)
    assert should_notify(report_of([waiting], interrupted="away"), "problems")
    assert not should_notify(report_of([waiting]), "changes")


def test_a_rollback_since_the_run_before_is_reported() -> None:
    report = report_of(complete("acme/a", promote=False), rollouts=[rollout("acme/b", "empty answers rose <to> 90%")])
    assert all(should_notify(report, on) for on in ("problems", "changes", "always"))
    assert "*Rolled back: 1 adapter*\n• acme/b: empty answers rose &lt;to&gt; 90%" in texts(slack_message(report, "x"))
    under_way = report.model_copy(update={"rollouts": (report.rollouts[0].model_copy(update={"state": "under way"}),)})
    assert not should_notify(under_way, "changes")
