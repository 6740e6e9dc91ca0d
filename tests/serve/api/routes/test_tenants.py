"""A tenant's share of the pool, which an admin sets."""

from __future__ import annotations

from typing import Any

import pytest


def test_fields_of_a_share_are_set_one_by_one(site: Any, tenant: str) -> None:
    with site.http(site.admin_key) as http:

        def share(**changes: Any) -> tuple[Any, ...]:
            answer = http.post(f"/v1/tenants/{tenant}/share", json=changes)
            assert answer.status_code == 200, answer.text
            assert http.get(f"/v1/tenants/{tenant}").json() == answer.json()
            return tuple(answer.json()[name] for name in ("weight", "max_running", "max_queued"))

        assert share() == (1.0, None, None)
        assert share(weight=2.5, max_running=3) == (2.5, 3, None)
        assert share(max_queued=0) == (2.5, 3, 0)
        assert share(max_running="unlimited", weight=1) == (1.0, None, 0)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": -1.0}, "weight"),
        ({"max_running": -1}, "max_running"),
        ({"max_running": "many"}, "max_running"),
        ({"max_queued": 1.5}, "max_queued"),
        ({"wibble": 1}, "wibble"),
    ],
)
def test_invalid_shares_are_refused(site: Any, tenant: str, changes: Any, param: str) -> None:
    with site.http(site.admin_key) as http:
        answer = http.post(f"/v1/tenants/{tenant}/share", json=changes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_only_an_admin_sets_and_reads_shares(site: Any, tenant: str) -> None:
    with site.http(site.key(tenant)) as own, site.http(site.admin_key) as admin:
        assert own.post(f"/v1/tenants/{tenant}/share", json={"weight": 9}).status_code == 403
        assert own.get(f"/v1/tenants/{tenant}").status_code == 403
        assert admin.post("/v1/tenants/unknown/share", json={"weight": 9}).status_code == 404
        assert admin.get("/v1/tenants/unknown").status_code == 404
