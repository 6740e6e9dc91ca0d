"""`client.tenants` and `client.keys`: tenants, their limits, and their API keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from loramill.client.models import CreatedTenant, NewKey, parse_object
from loramill.client.tenant_list import NewTenant
from loramill.submission.options import drop_none
from loramill.types import DeletionSummary, KeyRecord, Scope, TenantRecord

if TYPE_CHECKING:
    from loramill.client.http import Transport

#: A number, or "unlimited"; None keeps the current value.
Quota = int | Literal["unlimited"] | None


class TenantsResource:
    """Tenants of a gateway. Changing one needs an admin's key."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str) -> TenantRecord:
        """Creates a tenant.

        Raises:
            Conflict: A tenant of this name exists.
        """
        return parse_object(TenantRecord, self._transport.request_json("POST", "/v1/tenants", json={"name": name}))

    def create_many(
        self, tenants: Iterable[str | NewTenant], *, exist_ok: bool = False, keys: bool = False
    ) -> Sequence[CreatedTenant]:
        """Creates many tenants, all or none: everything is checked before any is created.

        Args:
            tenants: Names, or names with a weight and limits; at most 1000.
            exist_ok: Give an existing tenant the weight and limits of its entry instead of raising a Conflict.
            keys: Create an API key for each new tenant; it is returned only this once.

        Raises:
            Conflict: Some exist already; the message names them.
        """
        entries = [NewTenant(name=each) if isinstance(each, str) else each for each in tenants]
        body = {
            "tenants": [each.model_dump(exclude_none=True) for each in entries],
            "exist_ok": exist_ok,
            "keys": keys,
        }
        rows = self._transport.request_json("POST", "/v1/tenants/batch", json=body)["data"]
        return [parse_object(CreatedTenant, row) for row in rows]

    def get(self, name: str) -> TenantRecord:
        """Returns a tenant with its weight, quotas and limits."""
        return parse_object(TenantRecord, self._transport.request_json("GET", _tenant_path(name)))

    def delete(self, name: str, *, cancel_jobs: bool = False) -> DeletionSummary:
        """Deletes a tenant with its keys, files, jobs and adapters; usage and audit entries lose its name.

        Args:
            name: The tenant.
            cancel_jobs: Cancel its unfinished jobs; otherwise they raise a Conflict.
        """
        params = {"cancel_jobs": cancel_jobs}
        return parse_object(DeletionSummary, self._transport.request_json("DELETE", _tenant_path(name), params=params))

    def set_share(
        self,
        tenant: str,
        *,
        weight: float | None = None,
        max_running: Quota = None,
        max_queued: Quota = None,
    ) -> TenantRecord:
        """Sets a tenant's share of the training pool and its quotas. Omitted arguments keep their values.

        Args:
            tenant: The tenant.
            weight: Share of the training pool, relative to the weights of other tenants.
            max_running: Maximum number of jobs that run at the same time.
            max_queued: Maximum number of queued and paused jobs.
        """
        share = {"weight": weight, "max_running": max_running, "max_queued": max_queued}
        path = f"{_tenant_path(tenant)}/share"
        return parse_object(TenantRecord, self._transport.request_json("POST", path, json=drop_none(share)))

    def set_limits(
        self,
        tenant: str,
        *,
        requests_per_minute: Quota = None,
        tokens_per_minute: Quota = None,
        concurrent_requests: Quota = None,
        stored_bytes: Quota = None,
    ) -> TenantRecord:
        """Sets a tenant's limits at the gateways. Omitted arguments keep their values.

        Args:
            tenant: The tenant.
            requests_per_minute: Maximum number of requests per minute.
            tokens_per_minute: Maximum number of prompt and completion tokens per minute.
            concurrent_requests: Maximum number of requests that run at the same time.
            stored_bytes: Maximum total size of its uploaded files, imported adapters and stored completions.
        """
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "concurrent_requests": concurrent_requests,
            "stored_bytes": stored_bytes,
        }
        path = f"{_tenant_path(tenant)}/limits"
        return parse_object(TenantRecord, self._transport.request_json("POST", path, json=drop_none(limits)))

    def set_storage(
        self,
        tenant: str,
        *,
        store_completions: bool | None = None,
        completion_days: float | Literal["default"] | None = None,
    ) -> TenantRecord:
        """Records whether a tenant consents to storing completions. Omitted arguments keep their values.

        Args:
            tenant: The tenant.
            store_completions: Whether completions are stored whose request has `store: true`.
            completion_days: Days for which they are stored; "default": those of the settings.
        """
        storage = {"store_completions": store_completions, "completion_days": completion_days}
        path = f"{_tenant_path(tenant)}/storage"
        return parse_object(TenantRecord, self._transport.request_json("POST", path, json=drop_none(storage)))

    def list(self) -> Sequence[TenantRecord]:
        """Returns all tenants."""
        return [parse_object(TenantRecord, row) for row in self._transport.paginate("/v1/tenants")]


class KeysResource:
    """API keys of tenants. Creating and revoking one needs an admin's key."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self, tenant: str, *, scopes: Iterable[Scope | str] | None = None, expires_at: float | None = None
    ) -> NewKey:
        """Creates an API key for a tenant. Its `key` is returned only this once.

        Args:
            tenant: The tenant.
            scopes: "inference", "training", "adapters", "read". Default: all scopes.
            expires_at: Time of expiry in seconds since the epoch. Default: never.
        """
        request = {"scopes": None if scopes is None else [str(scope) for scope in scopes], "expires_at": expires_at}
        path = f"{_tenant_path(tenant)}/keys"
        return parse_object(NewKey, self._transport.request_json("POST", path, json=drop_none(request)))

    def revoke(self, key_id: str) -> None:
        """Revokes the key with this id immediately."""
        self._transport.request_json("DELETE", f"/v1/keys/{quote(key_id, safe='')}")

    def list(self, tenant: str) -> Sequence[KeyRecord]:
        """Returns a tenant's keys, without their secrets."""
        return [parse_object(KeyRecord, row) for row in self._transport.paginate(f"{_tenant_path(tenant)}/keys")]


def _tenant_path(tenant: str) -> str:
    return f"/v1/tenants/{quote(tenant, safe='')}"
