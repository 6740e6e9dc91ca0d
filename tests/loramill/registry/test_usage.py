"""Usage, rate windows, limits and the audit in the registry."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loramill.errors import InvalidRequest, NotFound, QuotaExceeded, Unauthenticated
from loramill.registry import Registry, api_keys, audit, datasets, tenants, usage
from loramill.registry.usage import UsageCount, UsageItem
from loramill.types import Limits, RateWindow, Scope


@pytest.fixture(autouse=True)
def acme(registry):
    with registry.writing() as session:
        tenants.create(session, "acme")
        tenants.create(session, "globex")


def write(registry, gateway, batch, counts=None, windows=None, now=1000.0):
    with registry.writing() as session:
        usage.record_batch(session, gateway, batch, counts or {}, windows or {}, now=now)


def windows_of_others(registry, gateway, minute=20, now=1200.0):
    with registry.reading() as session:
        return usage.peer_windows(session, gateway, minute=minute, now=now)


ADAPTER_ITEM = UsageItem("acme", "2026-01-31", "acme/a", "f" * 64)
BASE = UsageItem("acme", "2026-01-31", "tiny", "")


def test_a_batch_that_is_written_again_counts_once(registry: Registry) -> None:
    for batch, counts in (
        (1, {ADAPTER_ITEM: UsageCount(1, 10, 5)}),
        (1, {ADAPTER_ITEM: UsageCount(1, 10, 5)}),
        (2, {ADAPTER_ITEM: UsageCount(2, 1, 1)}),
    ):
        write(registry, "one", batch, counts)
    write(registry, "two", 1, {ADAPTER_ITEM: UsageCount(1, 0, 100), BASE: UsageCount(1, 2, 3)})
    with registry.reading() as session:
        adapted, base = usage.daily(session, "acme", "2026-01-01", "2026-12-31")
    assert (adapted.model, adapted.version, adapted.requests) == ("acme/a", "f" * 64, 4)
    assert (adapted.prompt_tokens, adapted.completion_tokens) == (11, 106)
    assert (base.version, base.requests, base.prompt_tokens, base.completion_tokens) == (None, 1, 2, 3)


def test_many_gateways_at_once_lose_nothing(registry: Registry) -> None:
    items = [UsageItem("acme", "2026-01-31", f"m{number}", "") for number in range(20)]

    def record(gateway: int) -> None:
        for batch in range(1, 6):
            order = items if gateway % 2 else items[::-1]
            write(registry, str(gateway), batch, {item: UsageCount(1, 1, 1) for item in order})

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(record, gateway) for gateway in range(4)]:
            done.result()
    with registry.reading() as session:
        assert {row.requests for row in usage.daily(session, None, "2026-01-31", "2026-01-31")} == {20}


def test_usage_by_day_and_tenant(registry: Registry) -> None:
    days = ["2026-01-30", "2026-01-31", "2026-02-01"]
    counts = {
        UsageItem(tenant, day, "tiny", ""): UsageCount(1, 2, 3) for tenant in ("acme", "globex", "") for day in days
    }
    write(registry, "one", 1, counts)
    with registry.reading() as session:
        assert [row.day for row in usage.daily(session, "acme", days[0], days[1])] == [days[1], days[0]]
        assert [row.tenant for row in usage.daily(session, None, days[2], days[2])] == [None, "acme", "globex"]
        assert usage.daily(session, "nobody", days[0], days[2]) == []


def test_gateways_read_each_others_rate_windows(registry: Registry) -> None:
    now = RateWindow(20, requests=3, tokens=40, running_requests=2, reserved_tokens=7)
    write(registry, "one", 1, windows={"acme": now, "globex": RateWindow(20, requests=1)}, now=1199.0)
    write(registry, "one", 1, windows={"acme": RateWindow(20, requests=4)}, now=1199.5)
    write(registry, "two", 1, windows={"acme": now}, now=1198.0)
    assert windows_of_others(registry, "one") == {"acme": [now]}
    found = windows_of_others(registry, "three")
    assert sorted(found["acme"], key=lambda window: window.requests) == [now, RateWindow(20, requests=4)]
    assert found["globex"] == [RateWindow(20, requests=1)]


def test_a_silent_gateway_runs_nothing_but_its_minute_counts(registry: Registry) -> None:
    write(
        registry,
        "dead",
        1,
        windows={"acme": RateWindow(20, requests=3, running_requests=2, reserved_tokens=9)},
        now=1194.0,
    )
    assert windows_of_others(registry, "one") == {"acme": [RateWindow(20, requests=3)]}
    assert windows_of_others(registry, "one", now=1198.9)["acme"][0].running_requests == 2
    long_ago = RateWindow(10, requests=3, running_requests=1)
    write(registry, "busy", 1, windows={"globex": long_ago}, now=1199.0)
    assert windows_of_others(registry, "one")["globex"] == [long_ago]
    write(registry, "busy", 1, windows={"globex": RateWindow(10, requests=3)}, now=1199.0)
    assert "globex" not in windows_of_others(registry, "one")


def test_deleted_gateways_leave_their_usage(registry: Registry) -> None:
    write(registry, "old", 3, {ADAPTER_ITEM: UsageCount(1, 1, 1)}, {"acme": RateWindow(20, requests=1)}, now=1000.0)
    write(registry, "new", 1, windows={"acme": RateWindow(20, requests=2)}, now=1100.0)
    with registry.writing() as session:
        usage.delete_silent_gateways(session, 1050.0)
    assert windows_of_others(registry, "me") == {"acme": [RateWindow(20, requests=2)]}
    write(registry, "old", 4, {ADAPTER_ITEM: UsageCount(1, 1, 1)})
    with registry.reading() as session:
        assert usage.daily(session, None, "2026-01-31", "2026-01-31")[0].requests == 2


def test_limits(registry: Registry) -> None:
    with registry.writing() as session:
        assert tenants.get(session, "acme").stored_bytes is None
        tenants.check_storage_quota(session, "acme", 10**15)
        limits = Limits(requests_per_minute=3, tokens_per_minute=2**40, concurrent_requests=2, stored_bytes=100)
        assert tenants.set_limits(session, "acme", limits) == tenants.get(session, "acme")
        assert tenants.get(session, "acme").tokens_per_minute == 2**40
        datasets.create(session, "acme", "a.jsonl", "a" * 64, 60, 1)
        datasets.create(session, "globex", "a.jsonl", "a" * 64, 60, 1)
        for lock in (False, True):
            tenants.check_storage_quota(session, "acme", 40, lock=lock)
            with pytest.raises(QuotaExceeded, match="stores 60 bytes and may store 100"):
                tenants.check_storage_quota(session, "acme", 41, lock=lock)
        assert tenants.set_limits(session, "acme", Limits()).stored_bytes is None
        with pytest.raises(NotFound):
            tenants.set_limits(session, "nobody", Limits())


def test_concurrent_uploads_do_not_exceed_the_storage_quota(registry: Registry) -> None:
    with registry.writing() as session:
        tenants.set_limits(session, "acme", Limits(stored_bytes=100))

    def store(_: int) -> bool:
        try:
            with registry.writing() as session:
                tenants.check_storage_quota(session, "acme", 60, lock=True)
                time.sleep(0.05)
                datasets.create(session, "acme", "a.jsonl", "a" * 64, 60, 1)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(store, range(2))) == [False, True]


def test_keys_expire_and_have_scopes(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry.writing() as session:
        every, _ = api_keys.create(session, "acme")
        made, secret = api_keys.create(
            session, "acme", scopes=[Scope.READ, Scope.INFERENCE, Scope.READ], expires_at=time.time() + 60
        )
        assert every.scopes == tuple(Scope) and every.expires_at is None
        assert made.scopes == (Scope.INFERENCE, Scope.READ)
        assert api_keys.authenticate(session, secret) == api_keys.get(session, made.id) == made
        with pytest.raises(InvalidRequest, match="scope"):
            api_keys.create(session, "acme", scopes=[])
        with pytest.raises(InvalidRequest, match="in the past"):
            api_keys.create(session, "acme", expires_at=time.time())
        then = time.time() + 61
        monkeypatch.setattr("loramill.registry.api_keys.time.time", lambda: then)
        with pytest.raises(Unauthenticated):
            api_keys.authenticate(session, secret)


def test_an_audit_entry_is_part_of_its_transaction(registry: Registry) -> None:
    def record_change(session, subject, tenant):
        return audit.record(
            session, tenant=tenant, actor=None, key="key-1", action="x.y", subject=subject, request="req-1", n=1
        )

    with registry.writing() as session:
        first, second = record_change(session, "a", "acme"), record_change(session, "b", "globex")
    with pytest.raises(ZeroDivisionError), registry.writing() as session:
        record_change(session, "c", "acme")
        raise ZeroDivisionError
    with registry.reading() as session:
        assert audit.list_changes(session, None) == [second, first]
        assert audit.list_changes(session, "acme") == [first]
        assert audit.list_changes(session, None, after=second.id) == [first]
        assert first.details == {"n": 1}
        for after, tenant in (("audit-0", None), (second.id, "acme")):
            with pytest.raises(NotFound):
                audit.list_changes(session, tenant, after=after)
