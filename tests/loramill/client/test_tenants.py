"""Limits, keys' scopes, usage, the audit and pins, through `Client` and the command line, on the real gateway."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loramill import errors
from loramill.cli import app
from loramill.types import Scope

from ...waiting import eventually
from ..conftest import RunningGateway, examples


@pytest.fixture(autouse=True)
def environment(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LORAMILL_HOME", str(gateway.home))
    monkeypatch.setenv("LORAMILL_URL", gateway.url)


def loramill(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def json_output(*arguments: str) -> Any:
    result = loramill(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_limits_from_the_client(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as admin:
        assert admin.tenants.set_limits(tenant, requests_per_minute=1, stored_bytes=5).requests_per_minute == 1
        assert admin.tenants.set_limits(tenant, stored_bytes="unlimited") == admin.tenants.get(tenant)
        assert (admin.tenants.get(tenant).stored_bytes, admin.tenants.get(tenant).requests_per_minute) == (None, 1)
        key = admin.keys.create(tenant).key
        base = admin.models()[0]
        with gateway.client(key) as own:
            own.chat(base, "hello")
            with own.openai().with_options(max_retries=0) as client, pytest.raises(Exception, match="1 requests"):
                client.chat.completions.create(model=base, messages=[{"role": "user", "content": "hello"}])
        admin.tenants.set_limits(tenant, requests_per_minute="unlimited", stored_bytes=5)
        with gateway.client(key) as own, pytest.raises(errors.QuotaExceeded, match="may store 5"):
            own.files.upload(examples())


def test_limits_from_the_command_line(gateway: RunningGateway, tenant: str) -> None:
    assert "unlimited" in loramill("tenant", "limits", tenant).stdout
    limits = ("--requests", "60", "--tokens", "5000", "--concurrent", "4", "--stored", "1000000")
    assert json_output("tenant", "limits", tenant, *limits)["tokens_per_minute"] == 5000
    printed = loramill("tenant", "limits", tenant, "--tokens", "unlimited").stdout
    assert printed.split() == "requests 60 requests/min tokens unlimited at once 4 requests files 1 MB".split()
    wrong = loramill("tenant", "limits", tenant, "--tokens", "many")
    assert wrong.exit_code == 2 and "--tokens" in wrong.stderr
    assert json_output("audit", "--tenant", tenant)[0]["details"]["tokens_per_minute"] is None
    assert len([row for row in json_output("audit", "--tenant", tenant) if row["action"] == "tenant.limits"]) == 2


def test_keys_have_scopes_and_expire(gateway: RunningGateway, tenant: str) -> None:
    made = json_output("key", "create", tenant, "--scope", "read", "--scope", "inference", "--expires", "30d")
    assert made["scopes"] == ["inference", "read"]
    assert abs(made["expires_at"] - time.time() - 30 * 86400) < 60
    listed = loramill("key", "list", tenant).stdout
    assert "inference, read" in listed and made["id"] in listed
    with gateway.client(made["key"]) as own:
        assert own.models()
        with pytest.raises(errors.Forbidden, match="'training'"):
            own.files.upload(examples())
    with gateway.client() as admin:
        expired = admin.keys.create(tenant, scopes=[Scope.READ], expires_at=time.time() + 1)
        time.sleep(max(0.0, float(expired.expires_at or 0) - time.time()) + 0.01)
        with gateway.client(expired.key) as own, pytest.raises(errors.Unauthenticated):
            own.models()
    for wrong in ("30", "d", "1.5h", "-1d", "1w"):
        assert loramill("key", "create", tenant, f"--expires={wrong}").exit_code == 2
    assert loramill("key", "create", tenant, "--scope", "root").exit_code == 2


def test_usage_is_shown(gateway: RunningGateway, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No requests in 2 days" in loramill("usage", "--tenant", tenant, "--days", "2").stderr
    with gateway.client() as admin:
        key = admin.keys.create(tenant).key
        job = admin.jobs.submit(f"{tenant}/a", examples()).id
        version = gateway.publish(job)
        with gateway.client(key) as own:
            own.chat(f"{tenant}/a", "one two three")
            own.chat(own.models()[0], "one two three")
        eventually(lambda: len(admin.usage(tenant)) == 2)
        today = datetime.now(UTC).date()
        base, adapted = sorted(admin.usage(tenant), key=lambda row: row.version or "")
        assert (adapted.model, adapted.version, adapted.day) == (f"{tenant}/a", version, today.isoformat())
        assert (base.requests, base.prompt_tokens, base.completion_tokens) == (1, 3, 3)
        assert admin.usage(tenant, last=today - timedelta(1)) == []
    monkeypatch.setenv("LORAMILL_API_KEY", key)
    assert {row["model"] for row in json_output("usage")} == {base.model, adapted.model}
    lines = loramill("usage", "--days", "1").stdout.splitlines()
    assert len(lines) == 3 and any(f"{tenant}/a@{version[:12]}" in line for line in lines)
    other = loramill("usage", "--tenant", "somebody")
    assert other.exit_code == 1 and "own tenant" in other.stderr


def test_the_audit_is_shown(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as admin:
        for number in range(3):
            admin.tenants.set_share(tenant, weight=1 + number)
        newest, *rest = admin.audit(tenant, limit=3)
        assert (newest.action, newest.actor, newest.details["weight"]) == ("tenant.share", None, 3)
        assert len(rest) == 2
        assert [row.action for row in admin.audit(tenant)][-1] == "tenant.create"
    printed = loramill("audit", "--tenant", tenant, "-n", "2").stdout
    assert printed.count("tenant.share") == 2 and "(admin)" in printed


def test_an_adapter_is_pinned_and_warmed(gateway: RunningGateway, tenant: str) -> None:
    name = f"{tenant}/a"
    with gateway.client() as admin:
        first, second = (gateway.publish(admin.jobs.submit(name, examples(word=word)).id) for word in ("x", "y"))
        assert admin.adapters.pin(name).pinned
        with pytest.raises(errors.Conflict, match="unpin"):
            admin.adapters.promote(name, "challenger")
        assert admin.adapters.warm(name, "challenger") >= 0
        assert not admin.adapters.unpin(name).pinned
    assert json_output("adapters", "pin", name, second[:12])["champion"] == second
    assert loramill("rollback", name).exit_code == 1
    assert first[:12] not in loramill("adapters", "unpin", name).stderr
    assert f"{name}@previous is loaded" in loramill("adapters", "warm", name, "previous").stderr
