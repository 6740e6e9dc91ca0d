"""`nightly-report.html`: one page that needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loramill.durations import rounded_duration
from loramill.pipelines.compare.format import scaled
from loramill.pipelines.nightly.outcome import UNSUCCESSFUL, Verdict
from loramill.pipelines.nightly.report.plot import LossPlot, ScorePlot, gain_bars, plot_losses, plot_scores
from loramill.pipelines.nightly.report.recorded import CANDIDATES
from loramill.pipelines.nightly.report.schema import AdapterReport, NightlyReport, ReportedScores, SliceHistory

_TEMPLATES = Path(__file__).parent / "templates"
#: Rows of the table on forgetting; the details have all of it.
_FORGOTTEN = 10
#: Characters of a reason in the table of adapters.
_REASON = 160
_TONES = {Verdict.PROMOTED: "good"} | dict.fromkeys((*UNSUCCESSFUL, Verdict.REJECTED), "bad")


@dataclass(frozen=True, slots=True)
class AdapterCharts:
    """The charts of an adapter; None where there is nothing to draw."""

    loss: LossPlot | None
    scores: ScorePlot | None


def render_html(report: NightlyReport) -> str:
    """Renders a report as one page; everything in it that tenants wrote is escaped."""
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    template = make_environment().get_template("nightly.html")
    return template.render(
        report=report,
        bars=gain_bars([each.gain for each in report.adapters]),
        charts=[_charts(each) for each in report.adapters],
        forgotten=_most_forgotten(report),
        problems=UNSUCCESSFUL,
        tone=_TONES,
        script=Markup(script),
        policy=_policy(script),
    )


@cache
def make_environment() -> Environment:
    """The environment of the templates, which escapes all values."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(_TEMPLATES),
    )
    environment.filters |= {
        "candidates": _candidates,
        "duration": rounded_duration,
        "iso": lambda at: datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
        "scaled": scaled,
        "sentence": _sentence,
        "shortened": _shortened,
        "utc_minute": _utc_minute,
        "words": lambda name: name.replace("_", " "),
    }
    return environment


def _policy(script: str) -> str:
    """A content security policy that allows this script alone: if a value were not escaped, it could still not run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _charts(adapter: AdapterReport) -> AdapterCharts:
    curve = adapter.training.curve if adapter.training else ()
    train = {each.step: each.train for each in curve if each.train is not None}
    valid = {each.step: each.valid for each in curve if each.valid is not None}
    return AdapterCharts(
        loss=plot_losses(train, valid) if curve else None,
        scores=plot_scores(adapter.history, _day) if adapter.history else None,
    )


def _most_forgotten(report: NightlyReport) -> list[tuple[str, SliceHistory]]:
    """The slices whose scores changed most for the worse, with their adapters."""
    found = [(each.adapter, history) for each in report.adapters for history in each.history]
    return sorted(found, key=lambda pair: (pair[1].change, pair[0]))[:_FORGOTTEN]


def _candidates(scores: Sequence[ReportedScores]) -> list[str]:
    """The candidates that have a score on any slice."""
    return [role for role in CANDIDATES if any(getattr(each, role) is not None for each in scores)]


def _sentence(reason: str) -> str:
    """A reason that begins with a capital letter."""
    return reason[:1].upper() + reason[1:]


def _shortened(reason: str) -> str:
    """The beginning of a reason, for a table; the details have all of it."""
    line = _sentence(" ".join(reason.split()))
    return line if len(line) <= _REASON else f"{line[:_REASON].rstrip()}…"


def _utc_minute(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%m-%d")
