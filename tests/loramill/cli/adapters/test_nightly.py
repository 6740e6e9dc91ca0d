"""`loramill nightly` with arguments, files and folders that are wrong: each ends with a message that says what is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.names import AdapterName
from loramill.registry import Registry, datasets, deletion, nightly, renaming, tenants
from loramill.types import StepStatus

from ....databases import create_sqlite_database
from ..running import clear_settings, json_output, loramill, ok

NAME = AdapterName("acme", "a")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    clear_settings(monkeypatch)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path))
    monkeypatch.setenv("LORAMILL_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LORAMILL_API_KEY", "none")
    monkeypatch.chdir(tmp_path)
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    opened = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with opened.writing() as session:
        tenants.create(session, "acme")
    yield opened
    opened.close()


def feed(registry: Registry, *lines: bytes) -> None:
    raw = b"".join(line + b"\n" for line in lines)
    artifact = registry.artifacts.put({"data.jsonl": raw})
    with registry.writing() as session:
        file = datasets.create(session, "acme", "x\x1b[31m\n.jsonl", artifact, len(raw), len(lines))
        nightly.add_data(session, NAME, file.id, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a directory"),
        (b"adapters: caf\xe9\n", "can't be read"),
        (b"- a\n- b\n", "must contain keys with values"),
        (b"a: [" * 200, "nightly.yaml:1: "),
        (b"split: {held_out: 2}\nsplit: {}\n", "the key split is there twice"),
        (b"schedule: {timezone: ../../etc/passwd}\n", "must be the name of a time zone"),
        (b"schedule: {cron: '61 * * * *'}\n", "must be a cron expression"),
        (b"sources: [{url: '/data/{user}/*'}]\n", "only {tenant} and {adapter} are replaced"),
        (b"\x00", "nightly.yaml"),
    ],
)
def test_files_that_are_no_definition(registry: Registry, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "nightly.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    ran = loramill("nightly", "validate")
    assert ran.exit_code == 1 and message.lower() in ran.stderr.lower() and "Traceback" not in ran.output
    assert ok("nightly", "status").stderr, "the faults are shown, and the command works"


def test_a_file_is_checked_without_a_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clear_settings(monkeypatch)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    (file := tmp_path / "nightly.yaml").write_text("split: {held_out: 0.2}\n")
    shown = ok("nightly", "validate", str(file))
    assert "20% is held out" in shown.stdout and "adapters" not in shown.stdout
    assert "nightly.yaml is valid" in shown.stderr and "The adapters are not listed" in shown.stderr
    file.write_text("split: {held_out: 2}\n")
    ran = loramill("nightly", "validate", str(file))
    assert ran.exit_code == 1 and "split.held_out must be" in ran.stderr and "database" not in ran.stderr
    assert not (tmp_path / "home" / "loramill.db").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "nothing.yaml"], "does not exist"),
        (["show", "nightly-0"], "There is no nightly run 'nightly-0'"),
        (["report", "nightly-0"], "There is no nightly run 'nightly-0'"),
        (["report"], "No nightly run has had new data yet"),
        (["retry", "nightly-0", "--from", "gate"], "There is no nightly run 'nightly-0'"),
        (["retry", "acme/a"], "'acme/a' has no data that is set aside"),
        (["retry", "noslash"], "is not an adapter name"),
        (["drop", "acme/a"], "has no new data"),
    ],
)
def test_names_that_do_not_exist(registry: Registry, arguments: list[str], message: str) -> None:
    ran = loramill("nightly", *arguments)
    assert ran.exit_code == 1 and message in ran.stderr


def test_a_run_that_had_nothing_to_do_is_not_denied(registry: Registry) -> None:
    with registry.writing() as session:
        nightly.finish_run(session, nightly.open_run(session).id)
    assert len(json_output("nightly", "history")) == 1
    assert "No nightly run has had new data yet" in ok("nightly", "show").stderr


@pytest.mark.parametrize(
    "arguments",
    [["retry", "nightly-0"], ["retry", "acme/a", "--from", "gate"], ["backfill"], ["backfill", "--since", "yesterday"]],
)
def test_wrong_usage(registry: Registry, arguments: list[str]) -> None:
    assert loramill("nightly", *arguments).exit_code == 2


@pytest.mark.parametrize("since", ["0001-01-01", "9999-12-31T23:59"])
def test_any_date_is_a_time_to_backfill_from(registry: Registry, since: str) -> None:
    feed(registry, b'{"prompt": "a", "completion": "b"}')
    number = 1 if since < "2000" else 0
    assert f"uses {number} file{'' if number else 's'} of" in ok("nightly", "backfill", "--since", since).stderr


def test_commands_show_an_adapter_that_was_renamed_and_one_that_was_deleted(registry: Registry) -> None:
    feed(registry, b'{"prompt": "a", "completion": "b"}')
    with registry.writing() as session:
        run = nightly.open_run(session).id
        nightly.record_step(session, run, NAME, "collect", StepStatus.FAILED, {"error": "x" * 10_000})
        nightly.finish_run(session, run)
        renaming.rename(session, NAME, AdapterName("acme", "b"))
    assert "acme/b" in ok("nightly", "show").stdout and "acme/b" in ok("nightly", "plan").stdout
    assert Path(ok("nightly", "report").stdout.strip()).is_file()
    with registry.writing() as session:
        deletion.delete_tenant(session, "acme")
    for command in ("show", "plan", "status", "history", "data"):
        ok("nightly", command)
    assert json_output("nightly", "history")[0]["id"] == run


def test_the_plan_has_the_numbers_of_the_definition(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "nightly.yaml").write_text("overrides:\n- adapters: acme/a\n  split: {held_out: 0.5}\n")
    feed(registry, *(b'{"prompt": "%d", "completion": "b"}' % number for number in range(20)))
    assert "trains on 10 new examples" in " ".join(ok("nightly", "plan").stdout.split())


def test_a_report_that_cannot_be_written_is_an_error(registry: Registry, tmp_path: Path) -> None:
    with registry.writing() as session:
        nightly.finish_run(session, run := nightly.open_run(session).id)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "report.html", tmp_path):
        ran = loramill("nightly", "report", run, "--html", str(place))
        assert ran.exit_code == 1 and str(place) in ran.stderr and "Traceback" not in ran.output


def test_control_characters_of_a_tenant_do_not_reach_the_terminal(registry: Registry) -> None:
    feed(registry, *[b'{"prompt": "a\x1b]0;x\x07", "completion": ""}'] * 3, b"\x1b[2J")
    ran = loramill("nightly", "run")
    assert ran.exit_code == 1
    shown = ran.output + ok("nightly", "show").output + ok("nightly", "data").output
    assert "4 of 4 rows are bad" in shown and not {"\x1b", "\x07"} & set(shown)
