"""Writes the report of a nightly run to files, and sends the message about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loramill.errors import InvalidRequest, LoramillError
from loramill.pipelines.nightly.definition import NightlyDefinition, NotifyDefinition, expanded, load_definition
from loramill.pipelines.nightly.report.html import render_html
from loramill.pipelines.nightly.report.message import should_notify, slack_message
from loramill.pipelines.nightly.report.records import read_records
from loramill.pipelines.nightly.report.schema import NightlyReport
from loramill.pipelines.nightly.report.summarize import summarize
from loramill.pipelines.nightly.report.webhook import send
from loramill.registry import Registry
from loramill.settings import Settings
from loramill.storage.atomic import replace_text
from loramill.types import NightlyRun, NightlyStep

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishedReport:
    """What became of a report.

    Attributes:
        page: the file that contains it; None if it was not written.
        problems: what could not be written or sent.
    """

    page: Path | None
    problems: tuple[str, ...] = ()


def build_report(
    registry: Registry,
    settings: Settings,
    run: NightlyRun,
    *,
    deleted: Sequence[NightlyStep] = (),
    interrupted: str | None = None,
) -> NightlyReport:
    """Builds the report of a run; for the arguments see `read_records`."""
    return summarize(read_records(registry, settings, run, deleted=deleted, interrupted=interrupted))


def report_page(settings: Settings, run: str) -> Path:
    """Where the page of a run is written unless another file is named; the JSON is next to it."""
    return settings.home / "nightly" / run / "nightly-report.html"


def write_page(report: NightlyReport, file: Path) -> Path:
    """Writes the page, and returns its absolute path.

    Raises:
        InvalidRequest: the file cannot be written.
    """
    page = file.expanduser().absolute()
    _write(page, render_html(report))
    return page


def publish_run(
    registry: Registry,
    settings: Settings,
    run: NightlyRun,
    *,
    deleted: Sequence[NightlyStep] = (),
    interrupted: str | None = None,
    file: Path | None = None,
    definition: NightlyDefinition | None = None,
) -> PublishedReport:
    """Writes the page and the JSON of a run, and sends the message about it. No failure here fails the run.

    Args:
        registry: the registry of the run.
        settings: for the folder of reports, and the devices of the pool.
        run: the run, which has ended or was interrupted.
        deleted: steps of adapters that were deleted during the run.
        interrupted: why it stopped before its end.
        file: another place for the page.
        definition: where and when to send the message. Default: that of nightly.yaml.
    """
    try:
        report = build_report(registry, settings, run, deleted=deleted, interrupted=interrupted)
        page = write_page(report, file or report_page(settings, run.id))
        _write(report_page(settings, run.id).with_suffix(".json"), report.model_dump_json(indent=2) + "\n")
        problem = _notify(report, page, (definition or load_definition(settings)).notify)
    except LoramillError as error:
        return _failed(error.message)
    except Exception as error:  # the run's work is done; a bug in its report must not make it a failure
        log.exception("the report of %s failed", run.id)
        return _failed(f"The report of {run.id} could not be made ({type(error).__name__}: {error}).")
    if problem is not None:
        log.warning("%s", problem)
    return PublishedReport(page, () if problem is None else (problem,))


def _failed(problem: str) -> PublishedReport:
    log.warning("%s", problem)
    return PublishedReport(None, (problem,))


def _notify(report: NightlyReport, page: Path, notify: NotifyDefinition) -> str | None:
    """Sends the message if the definition wants it; returns why it did not arrive."""
    if notify.webhook is None or not should_notify(report, notify.on):
        return None
    try:
        url = expanded(notify.webhook)
    except LoramillError as error:
        return error.message
    return send(url, slack_message(report, str(page))).problem


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
    except OSError as error:
        raise InvalidRequest(f"The report can't be written to {file}: {error.strerror}.") from error
