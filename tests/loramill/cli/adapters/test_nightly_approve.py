"""`loramill nightly approve`, and what other commands show of challengers that wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.names import AdapterName
from loramill.registry import Registry, adapters, audit, tenants
from loramill.types import Approval, VersionRecord

from ....databases import create_sqlite_database
from ...registry.waiting_challengers import ask
from ..running import clear_settings, json_output, loramill, ok

FIRST, SECOND = "1" * 64, "2" * 64


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    clear_settings(monkeypatch)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path))
    create_sqlite_database(url := f"sqlite:///{tmp_path / 'loramill.db'}")
    opened = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with opened.writing() as session:
        tenants.create(session, "acme")
    yield opened
    opened.close()


@pytest.fixture
def pending(registry: Registry) -> Approval:
    return asking(registry, "acme/a")


def asking(registry: Registry, name: str, share: float = 0.0) -> Approval:
    with registry.writing() as session:
        adapters.get_or_create(session, AdapterName.parse(name))
        for version in (FIRST, SECOND):
            record = VersionRecord(id=version, adapter=name, job=None, base="b" * 64, bytes=7, created_at=1.0)
            adapters.add_version(session, record)
        return ask(session, name, SECOND, FIRST, share=share)


def champion(registry: Registry, name: str) -> str | None:
    with registry.reading() as session:
        return adapters.get(session, name).champion


def test_what_waits_is_shown_with_the_command_and_approved_by_it(registry: Registry, pending: Approval) -> None:
    command = f"nightly approve {pending.run} acme/a"
    for shown in (
        ok("nightly", "status").stderr,
        ok("nightly", "show").stderr,
        ok("nightly", "show", pending.run).stderr,
    ):
        assert f"`loramill {command}`" in " ".join(shown.split())
    assert "1 awaiting approval" in ok("nightly", "history").stdout
    assert json_output("nightly", "status")["approvals"][0] == pending.model_dump(mode="json")
    assert json_output("nightly", "show")["approvals"][0]["adapter"] == "acme/a"
    assert "acme/a now answers with 222222222222." in ok(*command.split(), "--reason", "good").stderr
    assert champion(registry, "acme/a") == SECOND
    assert "waits for approval" not in ok("nightly", "status").stderr
    assert "approved by command line: good" in ok("nightly", "show").stdout
    with registry.reading() as session:
        (entry,) = audit.list_changes(session, "acme")
    assert (entry.action, entry.subject, entry.key) == ("adapter.approve", "acme/a", "command line")
    assert entry.details == {"version": SECOND}
    again = loramill(*command.split())
    assert again.exit_code == 1 and "was approved by command line" in again.stderr


def test_a_canary_is_announced(registry: Registry) -> None:
    pending = asking(registry, "acme/a", share=0.2)
    assert "answers 20% of the requests" in ok("nightly", "approve", pending.run, "acme/a").stderr
    assert champion(registry, "acme/a") == FIRST


def test_no_canary_is_announced_for_one_that_was_promoted_by_hand(registry: Registry) -> None:
    pending = asking(registry, "acme/a", share=0.2)
    with registry.writing() as session:
        adapters.promote(session, "acme/a", SECOND, "by hand")
    assert "acme/a now answers with 222222222222." in ok("nightly", "approve", pending.run, "acme/a").stderr


def test_a_rejection_keeps_the_champion(registry: Registry, pending: Approval) -> None:
    ran = json_output("nightly", "approve", pending.run, "acme/a", "--reject", "--reason", "too curt")
    assert (ran[0]["state"], ran[0]["note"]) == ("rejected", "too curt")
    assert champion(registry, "acme/a") == FIRST


def test_one_that_was_promoted_by_hand_cannot_be_rejected_until_it_is_rolled_back(
    registry: Registry, pending: Approval
) -> None:
    with registry.writing() as session:
        adapters.promote(session, "acme/a", SECOND, "by hand")
    rejecting = ("nightly", "approve", pending.run, "acme/a", "--reject")
    ran = loramill(*rejecting)
    assert ran.exit_code == 1 and "is the champion of acme/a already" in " ".join(ran.stderr.split())
    assert champion(registry, "acme/a") == SECOND and "1 awaiting approval" in ok("nightly", "history").stdout
    with registry.writing() as session:
        adapters.rollback(session, "acme/a", "by hand")
    ok(*rejecting)
    assert champion(registry, "acme/a") == FIRST and "1 rejected" in ok("nightly", "history").stdout


def test_one_that_cannot_be_approved_stops_no_other(registry: Registry, pending: Approval) -> None:
    ran = loramill("nightly", "approve", pending.run, "acme/none", "acme/a")
    assert ran.exit_code == 1 and "There is no adapter 'acme/none'" in ran.stderr
    assert champion(registry, "acme/a") == SECOND


def test_all_are_those_of_the_run(registry: Registry, pending: Approval) -> None:
    other = asking(registry, "acme/b")
    assert "acme/b now answers" in ok("nightly", "approve", other.run, "--all").stderr
    assert (champion(registry, "acme/a"), champion(registry, "acme/b")) == (FIRST, SECOND)
    assert f"Nothing of {other.run} waits" in ok("nightly", "approve", other.run, "--all").stderr


def test_a_run_that_does_not_exist_is_an_error(registry: Registry, pending: Approval) -> None:
    for arguments in (["--all"], ["--all", "--json"]):
        ran = loramill("nightly", "approve", f"{pending.run}0", *arguments)
        assert ran.exit_code == 1 and "There is no nightly run" in ran.stderr
    assert champion(registry, "acme/a") == FIRST


def test_adapters_or_all_are_given(registry: Registry) -> None:
    for arguments in ([], ["acme/a", "--all"]):
        ran = loramill("nightly", "approve", "nightly-0", *arguments)
        assert ran.exit_code == 2 and "--all" in ran.stderr
