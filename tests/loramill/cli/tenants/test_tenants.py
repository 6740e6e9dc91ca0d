"""`adapters delete`, `adapters rename`, `tenant delete` and `tenant create` of many, on the real gateway."""

from __future__ import annotations

import csv
import json
import stat
from pathlib import Path

import pytest

from loramill import errors
from loramill.cli import confirm

from ...conftest import RunningGateway, examples
from ..running import json_output, loramill, use_gateway


@pytest.fixture(autouse=True)
def environment(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gateway(monkeypatch, gateway)


def trained(gateway: RunningGateway, adapter: str, *contents: str) -> list[str]:
    with gateway.client() as client:
        return [gateway.publish(client.jobs.submit(adapter, examples(word=content)).id) for content in contents]


def test_an_adapter_is_deleted_and_renamed(gateway: RunningGateway, tenant: str) -> None:
    name, to = f"{tenant}/support", f"{tenant}/help"
    first, second, third = trained(gateway, name, "a", "b", "c")
    ran = loramill("adapters", "rename", name, to)
    assert (ran.exit_code, ran.stderr) == (0, f"{name} is now {to}.\n")
    assert loramill("adapters", "show", name).exit_code == 1
    ran = loramill("adapters", "delete", f"{to}@{second[:8]}", "--yes")
    assert (ran.exit_code, ran.stderr) == (0, f"{to}@{second[:8]} is deleted.\n")
    for version, options, message in ((third, (), "--force"), (first, ("--force",), "is the champion")):
        ran = loramill("adapters", "delete", f"{to}@{version[:8]}", "--yes", *options)
        assert ran.exit_code == 1 and message in ran.stderr
    assert loramill("adapters", "delete", f"{to}@{third[:12]}", "--yes", "--force").exit_code == 0
    assert [row["id"] for row in json_output("adapters", "show", to)["versions"]] == [first]
    with gateway.client() as client:
        job = client.jobs.submit(to, examples(word="d")).id
    ran = loramill("adapters", "delete", to, "--yes")
    assert ran.exit_code == 1 and job in ran.stderr and "loramill jobs cancel" in ran.stderr
    ran = loramill("adapters", "delete", to, "--yes", "--cancel-jobs")
    assert ran.exit_code == 0
    assert ran.stderr == f"{to} is deleted, with 1 version and 4 jobs. 1 job had not ended and was cancelled.\n"
    ran = loramill("adapters", "delete", to, "--yes")
    assert (ran.exit_code, ran.stderr) == (1, f"There is no adapter '{to}'.\n")


def test_several_adapters_are_deleted_only_if_all_exist(gateway: RunningGateway, tenant: str) -> None:
    for name in "ab":
        trained(gateway, f"{tenant}/{name}", name)
    ran = loramill("adapters", "delete", f"{tenant}/a", f"{tenant}/none", "--yes")
    assert ran.exit_code == 1 and "none" in ran.stderr
    removed = json_output("adapters", "delete", f"{tenant}/a", f"{tenant}/b", "--yes")
    assert [row["versions"] for row in removed] == [1, 1]


def test_a_deletion_is_confirmed_by_typing(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(gateway, f"{tenant}/a", "a")
    for arguments in (("adapters", "delete", f"{tenant}/a"), ("tenant", "delete", tenant)):
        ran = loramill(*arguments)  # in a script, without a terminal to confirm on
        assert ran.exit_code == 2 and "--yes" in ran.stderr
    monkeypatch.setattr(confirm, "_is_interactive", lambda: True)
    for arguments, typed in (
        (("adapters", "delete", f"{tenant}/a"), "no\n"),
        (("tenant", "delete", tenant), "yes\n"),
        (("tenant", "delete", tenant), "\n"),
    ):
        ran = loramill(*arguments, stdin=typed)
        assert ran.exit_code == 1 and "can't be undone" in ran.stderr and "Nothing was deleted" in ran.stderr
    assert loramill("adapters", "delete", f"{tenant}/a", stdin="yes\n").exit_code == 0
    ran = loramill("tenant", "delete", tenant, stdin=f"{tenant}\n")
    assert ran.exit_code == 0 and f"Tenant {tenant} is deleted" in ran.stderr
    assert loramill("tenant", "limits", tenant).exit_code == 1


def test_the_client_deletes(gateway: RunningGateway, tenant: str) -> None:
    name = f"{tenant}/a"
    first, second = trained(gateway, name, "a", "b")
    with gateway.client() as admin:
        with pytest.raises(errors.Conflict, match="challenger"):
            admin.adapters.delete_version(name, second)
        admin.adapters.delete_version(name, second, force=True)
        assert admin.adapters.rename(name, f"{tenant}/b").champion == first
        assert admin.adapters.delete(f"{tenant}/b").versions == 1
        with pytest.raises(errors.NotFound):
            admin.adapters.delete(f"{tenant}/b")
        assert admin.tenants.delete(tenant).files == 2
        with pytest.raises(errors.NotFound):
            admin.tenants.get(tenant)


def test_several_tenants_are_created_together_or_not_at_all(
    gateway: RunningGateway, tenant: str, tmp_path: Path
) -> None:
    a, b, c = (f"{tenant}-{letter}" for letter in "abc")
    ran = loramill("tenant", "create", a, b)
    assert (ran.exit_code, ran.stdout) == (0, "") and "2 tenants created" in ran.stderr
    ran = loramill("tenant", "create", b, c)
    assert ran.exit_code == 1 and b in ran.stderr and "--exist-ok" in ran.stderr
    assert loramill("tenant", "limits", c).exit_code == 1
    ran = loramill("tenant", "create", c, "Bad Name")
    assert ran.exit_code == 1 and "Bad Name" in ran.stderr
    assert loramill("tenant", "limits", c).exit_code == 1
    ran = loramill("tenant", "create", b, c, "--exist-ok")
    assert ran.exit_code == 0 and ran.stderr.startswith(f"Tenant {c} created, 1 already existed;")
    assert loramill("tenant", "create").exit_code == 2
    assert json_output("tenant", "create", f"{tenant}-d")["name"] == f"{tenant}-d"


def test_a_list_of_tenants_with_limits_and_keys(gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    file, out = tmp_path / "tenants.csv", tmp_path / "keys.csv"
    file.write_text(f"name;weight;requests_per_minute\n{tenant};3;\n{tenant}-b;;7\n{tenant}-c;;\n")
    ran = loramill("tenant", "create", "--file", str(file), "--keys-out", str(out))
    assert ran.exit_code == 1 and not out.exists()  # one of them exists
    ran = loramill("tenant", "create", "--file", str(file), "--keys-out", str(out), "--exist-ok")
    assert ran.exit_code == 0, ran.stderr
    assert (ran.stdout, "lm-" in ran.stderr) == ("", False)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["tenant"] for row in rows] == [f"{tenant}-b", f"{tenant}-c"]
    with gateway.client(rows[0]["key"]) as own:
        assert own.keys.list(f"{tenant}-b")[0].id == rows[0]["key_id"]
    with gateway.client() as admin:
        assert (admin.tenants.get(tenant).weight, admin.tenants.get(f"{tenant}-b").requests_per_minute) == (3.0, 7)
    again = loramill("tenant", "create", "--file", str(file), "--exist-ok", "--keys-out", str(out))
    assert again.exit_code == 1 and "exists; keys are written" in again.stderr
    ran = loramill("tenant", "create", f"{tenant}-e", f"{tenant}-f", "--with-keys")
    assert ran.exit_code == 0 and ran.stdout.count("lm-") == 2 and "can't be shown again" in ran.stderr
    made = json_output("tenant", "create", f"{tenant}-g", f"{tenant}-h", "--with-keys")
    assert all(row["key"].startswith("lm-") and row["new"] for row in made)


def test_submit_creates_missing_tenants(gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(examples())
    one = ("submit", f"{tenant}-x/a", "--train", str(tmp_path / "train.jsonl"))
    ran = loramill(*one)
    assert ran.exit_code == 1 and f"{tenant}-x" in ran.stderr
    ran = loramill(*one, "--create-tenant")
    assert ran.exit_code == 0 and f"Tenant {tenant}-x created." in ran.stderr, ran.stderr
    rows = [{"adapter": f"{tenant}-{letter}/a", "train": "train.jsonl"} for letter in "xyz"]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = loramill("submit", "--file", str(tmp_path / "jobs.jsonl"), "--create-tenant")
    assert ran.exit_code == 0 and ran.stderr.count("created") == 2, ran.stderr
    (tmp_path / "wrong.jsonl").write_text('{"adapter": "never-made/a"}\n')
    assert loramill("submit", "--file", str(tmp_path / "wrong.jsonl"), "--create-tenant").exit_code == 1
    assert loramill("tenant", "limits", "never-made").exit_code == 1


def test_limits_and_jobs_are_shown_with_units(gateway: RunningGateway, tenant: str) -> None:
    limits = ("--requests", "600", "--tokens", "50000", "--stored", "1GB")
    assert json_output("tenant", "limits", tenant, *limits)["stored_bytes"] == 10**9
    printed = " ".join(loramill("tenant", "limits", tenant).stdout.split())
    assert printed == "requests 600 requests/min tokens 50,000 tokens/min at once unlimited files 1 GB"
    assert loramill("tenant", "limits", tenant, "--stored", "1 gigabyte").exit_code == 2
    with gateway.client() as client:
        client.tenants.set_share(tenant, max_queued=5)
        job = client.jobs.submit(f"{tenant}/a", examples()).id
    [row] = [line.split() for line in loramill("tenant", "list").stdout.splitlines() if line.split()[0] == tenant]
    assert row[-4:] == ["0", "unlimited", "1", "5"]
    printed = loramill("jobs", "watch", "--once", "--tenant", tenant).stdout
    assert "1 job: 1 queued" in printed
    with gateway.client() as client:
        client.jobs.cancel(job)


def test_the_audit_fits_a_hundred_columns(
    gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (version,) = trained(gateway, f"{tenant}/support", "a")
    with gateway.client() as admin:
        key = admin.keys.create(tenant, expires_at=1798549271.5)
        admin.tenants.set_limits(tenant, requests_per_minute=600, stored_bytes=10**9)
        admin.adapters.pin(f"{tenant}/support")
    lines = loramill("audit", "--tenant", tenant).stdout.splitlines()
    printed = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    for pair in (f"version={version[:12]}", "requests/min=600", "stored=1GB", "scopes=all", "expires=2026-12-29"):
        assert pair in printed
    assert key.id[:12] in printed and key.id not in printed
    assert "{" not in printed
