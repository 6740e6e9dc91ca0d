"""Reports of runs in a real registry: what is read, written and sent, and that no failure of a report fails a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.errors import InvalidRequest
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import NightlyDefinition, NotifyDefinition
from loramill.pipelines.nightly.report import publish
from loramill.pipelines.nightly.report.message import NotifyOn
from loramill.pipelines.nightly.report.publish import build_report, publish_run, report_page, write_page
from loramill.pipelines.nightly.report.schema import NightlyReport
from loramill.pipelines.nightly.report.webhook import Delivery
from loramill.registry import Registry, adapters, datasets, jobs, nightly, tenants
from loramill.settings import Settings
from loramill.types import JobSpec, NightlyRun, StepStatus

from ....databases import create_sqlite_database
from .runs import complete


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    loaded = Settings.load(home=tmp_path / "home")
    return loaded.model_copy(update={"jobs": loaded.jobs.model_copy(update={"use_gpu": False, "threads": 2})})


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    opened = Registry.open(url, (tmp_path / "artifacts").as_uri())
    yield opened
    opened.close()


@pytest.fixture
def run(registry: Registry) -> NightlyRun:
    """A run of one adapter whose job ran for ten seconds with metrics of three steps."""
    name = AdapterName("acme", "a")
    with registry.writing() as session:
        tenants.create(session, "acme")
        adapters.get_or_create(session, name)
        raw = b'{"prompt": "a", "completion": "b"}\n'
        artifact = registry.artifacts.put({"data.jsonl": raw})
        file = datasets.create(session, "acme", "a.jsonl", artifact, len(raw), 1).id
        job = jobs.submit(session, JobSpec(base="base", adapter="acme/a", train=file, steps=3, batch_size=1), {})
        opened = nightly.open_run(session)
        for step in complete("acme/a"):
            result = step.result | ({"job": job.id} if step.step == "train" else {})
            nightly.record_step(session, opened.id, name, step.step, StepStatus.DONE, result)
    with registry.writing() as session:
        leased = jobs.lease(session, "session-1", now=time.time(), seconds=60, max_attempts=1)
        assert leased is not None
        for number in (1, 2, 3):
            data = {"step": number, "train_loss": 3.0 / number}
            jobs.add_event(session, leased.id, "", kind="metrics", data=data)
        return nightly.finish_run(session, opened.id)


def notifying(webhook: str | None = None, on: NotifyOn = "changes") -> NightlyDefinition:
    return NightlyDefinition(notify=NotifyDefinition(webhook=webhook, on=on))


def test_a_run_is_read_with_its_job_its_losses_and_its_cost(
    registry: Registry, settings: Settings, run: NightlyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time() + 10
    monkeypatch.setattr("loramill.pipelines.nightly.report.records.time.time", lambda: now)
    report = build_report(registry, settings, run)
    (adapter,) = report.adapters
    assert adapter.training is not None
    assert [(each.step, each.train) for each in adapter.training.curve] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert report.totals.cost.device == "cpu"
    assert report.totals.cost.device_seconds == pytest.approx(20, abs=5), "ten seconds on two threads"


def test_the_page_and_the_json_are_in_the_folder_of_the_run(
    registry: Registry, settings: Settings, run: NightlyRun
) -> None:
    published = publish_run(registry, settings, run)
    page = settings.home / "nightly" / run.id / "nightly-report.html"
    assert published.page == page == report_page(settings, run.id) and published.problems == ()
    assert "acme/a" in page.read_text(encoding="utf-8")
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert data["version"] == 1 and NightlyReport.model_validate(data).run == run.id


def test_another_file_can_be_named(registry: Registry, settings: Settings, run: NightlyRun, tmp_path: Path) -> None:
    file = tmp_path / "reports" / "today.html"
    assert publish_run(registry, settings, run, file=file).page == file and file.is_file()
    assert report_page(settings, run.id).with_suffix(".json").is_file()
    with pytest.raises(InvalidRequest, match="can't be written"):
        write_page(build_report(registry, settings, run), tmp_path / "reports")


def test_a_message_is_sent_if_the_definition_wants_it(
    registry: Registry, settings: Settings, run: NightlyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, dict]] = []

    def send(url: str, message: dict) -> Delivery:
        sent.append((url, message))
        return Delivery()

    monkeypatch.setattr(publish, "send", send)
    monkeypatch.setenv("HOOK", "http://hook/secret")
    for definition in (notifying(), notifying("${HOOK}", "problems")):
        publish_run(registry, settings, run, definition=definition)
    assert sent == []
    publish_run(registry, settings, run, definition=notifying("${HOOK}"))
    ((url, message),) = sent
    assert url == "http://hook/secret" and str(report_page(settings, run.id)) in json.dumps(message)


def test_no_failure_of_a_report_fails_the_run(
    registry: Registry, settings: Settings, run: NightlyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unset = publish_run(registry, settings, run, definition=notifying("${UNSET_HOOK}"))
    assert unset.page is not None and "UNSET_HOOK" in unset.problems[0]
    refused = notifying("http://127.0.0.1:9/secret")
    monkeypatch.setattr("loramill.pipelines.nightly.report.webhook.PAUSES", ())
    (problem,) = publish_run(registry, settings, run, definition=refused).problems
    assert "127.0.0.1" in problem and "secret" not in problem
    (problem,) = publish_run(registry, settings, run, file=tmp_path).problems
    assert "can't be written" in problem

    def broken(report: NightlyReport) -> str:
        raise KeyError("slice")

    monkeypatch.setattr(publish, "render_html", broken)
    failed = publish_run(registry, settings, run)
    assert failed.page is None and failed.problems == (
        f"The report of {run.id} could not be made (KeyError: 'slice').",
    )
