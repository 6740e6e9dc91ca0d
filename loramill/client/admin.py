"""The part of `loramill.Client` that is about tenants, their keys and limits, and what they used and changed."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from itertools import islice
from typing import Literal
from urllib.parse import quote

from loramill.client.http import Transport
from loramill.client.models import CreatedTenant, NewKey, parse_object
from loramill.client.tenant_list import NewTenant
from loramill.submission.options import drop_none
from loramill.types import AuditRecord, DeletionSummary, KeyRecord, Scope, TenantRecord, UsageRecord

#: A number, or no limit; None leaves it as it is.
Quota = int | Literal["unlimited"] | None


class TenantsResource:
    """Tenants of a gateway, for `Client` to inherit; what changes one needs an admin's key."""

    _wire: Transport

    def create_tenant(self, name: str) -> TenantRecord:
        """Makes a tenant. Conflict: the name is taken."""
        return parse_object(TenantRecord, self._wire.request_json("POST", "/v1/tenants", json={"name": name}))

    def create_tenants(
        self, tenants: Iterable[str | NewTenant], *, exist_ok: bool = False, keys: bool = False
    ) -> list[CreatedTenant]:
        """Makes many tenants, all or none: everything is checked before any is made.

        Args:
            tenants: names, or names with a share and limits; at most 1000.
            exist_ok: a tenant that exists gets the share and limits that are given, instead of a Conflict.
            keys: make an API key for each new one, which is shown this once.

        Raises:
            Conflict: some exist already; the message names them.
        """
        wanted = [NewTenant(name=each) if isinstance(each, str) else each for each in tenants]
        body = {
            "tenants": [each.model_dump(exclude_none=True) for each in wanted],
            "exist_ok": exist_ok,
            "keys": keys,
        }
        rows = self._wire.request_json("POST", "/v1/tenants/batch", json=body)["data"]
        return [parse_object(CreatedTenant, row) for row in rows]

    def delete_tenant(self, name: str, *, cancel_jobs: bool = False) -> DeletionSummary:
        """Deletes a tenant with its keys, files, jobs and adapters; usage and audit rows stay without its name.

        Args:
            cancel_jobs: cancels its jobs that have not ended; without it they are a Conflict.
        """
        return parse_object(
            DeletionSummary,
            self._wire.request_json("DELETE", _tenant_path(name, ""), params={"cancel_jobs": cancel_jobs}),
        )

    def tenants(self) -> list[TenantRecord]:
        """All tenants."""
        return [parse_object(TenantRecord, row) for row in self._wire.paginate("/v1/tenants")]

    def tenant(self, name: str) -> TenantRecord:
        """One tenant with its share, quotas and limits."""
        return parse_object(TenantRecord, self._wire.request_json("GET", _tenant_path(name, "")))

    def set_share(
        self,
        tenant: str,
        *,
        weight: float | None = None,
        max_running: Quota = None,
        max_queued: Quota = None,
    ) -> TenantRecord:
        """Sets a tenant's share of the pool and its quotas; what isn't given stays as it is.

        Args:
            weight: tokens that it may train on, relative to the other tenants'.
            max_running: jobs that run at once.
            max_queued: jobs that may wait.
        """
        share = {"weight": weight, "max_running": max_running, "max_queued": max_queued}
        return parse_object(
            TenantRecord, self._wire.request_json("POST", _tenant_path(tenant, "/share"), json=drop_none(share))
        )

    def set_limits(
        self,
        tenant: str,
        *,
        requests_per_minute: Quota = None,
        tokens_per_minute: Quota = None,
        concurrent_requests: Quota = None,
        stored_bytes: Quota = None,
    ) -> TenantRecord:
        """Sets what a tenant may use of the gateways; what isn't given stays as it is.

        Args:
            tokens_per_minute: of prompts and of answers.
            concurrent_requests: generations that run at once.
            stored_bytes: of uploaded files and imported adapters.
        """
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "concurrent_requests": concurrent_requests,
            "stored_bytes": stored_bytes,
        }
        return parse_object(
            TenantRecord, self._wire.request_json("POST", _tenant_path(tenant, "/limits"), json=drop_none(limits))
        )

    def create_key(
        self, tenant: str, *, scopes: Iterable[Scope | str] | None = None, expires_at: float | None = None
    ) -> NewKey:
        """Makes an API key for a tenant; its `key` is shown this once.

        Args:
            scopes: what it may be used for: "inference", "training", "adapters", "read"; None: all of these.
            expires_at: when it becomes worthless, in seconds since the epoch; None: never.
        """
        asked = {"scopes": None if scopes is None else [str(scope) for scope in scopes], "expires_at": expires_at}
        return parse_object(
            NewKey, self._wire.request_json("POST", _tenant_path(tenant, "/keys"), json=drop_none(asked))
        )

    def keys(self, tenant: str) -> list[KeyRecord]:
        """A tenant's keys, without their secrets."""
        return [parse_object(KeyRecord, row) for row in self._wire.paginate(_tenant_path(tenant, "/keys"))]

    def revoke_key(self, key_id: str) -> None:
        """Makes a key (by its id) worthless at once."""
        self._wire.request_json("DELETE", f"/v1/keys/{quote(key_id, safe='')}")

    def usage(
        self, tenant: str | None = None, *, first: date | None = None, last: date | None = None
    ) -> list[UsageRecord]:
        """What was asked on each day (UTC), of each base or version, the newest day first.

        Args:
            tenant: whose; None: the key's own, or all of an admin's.
            first, last: the days; None: the last 30.
        """
        query = {"tenant": tenant, "from": first and first.isoformat(), "to": last and last.isoformat()}
        rows = self._wire.request_json("GET", "/v1/usage", params=drop_none(query))["data"]
        return [parse_object(UsageRecord, row) for row in rows]

    def audit(self, tenant: str | None = None, *, limit: int = 100) -> list[AuditRecord]:
        """At most `limit` changes that were made through the API, newest first.

        Args:
            tenant: to whose things; None: the key's own, or all of an admin's.
        """
        rows = self._wire.paginate("/v1/audit", limit=min(limit, 100), query=drop_none({"tenant": tenant}))
        return [parse_object(AuditRecord, row) for row in islice(rows, limit)]


def _tenant_path(tenant: str, below: str) -> str:
    return f"/v1/tenants/{quote(tenant, safe='')}{below}"
