"""Tenants, their API keys, limits and usage, and the audit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import Field, field_validator

from loramill.types.base import FrozenModel
from loramill.types.feedback import CompletionStorage


class Scope(StrEnum):
    """What a key may be used for. An admin's key has every scope; a tenant's key has those it was created with."""

    INFERENCE = "inference"
    TRAINING = "training"
    ADAPTERS = "adapters"
    READ = "read"


class Limits(FrozenModel):
    """What a tenant may use of all gateways together; None: no limit."""

    requests_per_minute: int | None = Field(
        default=None, ge=1, lt=2**31, description="Maximum number of requests per minute."
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, lt=2**53, description="Maximum number of prompt and completion tokens per minute."
    )
    concurrent_requests: int | None = Field(
        default=None, ge=1, lt=2**31, description="Maximum number of requests that run at the same time."
    )
    stored_bytes: int | None = Field(
        default=None,
        ge=0,
        lt=2**53,
        description="Maximum total size of uploaded files, imported adapters and stored completions.",
    )


class TenantRecord(Limits, CompletionStorage):
    """A tenant with its limits, its fair share, its consent to storage and its number of jobs.

    A limit or quota of null means unlimited.
    """

    id: int = Field(description="Number of the tenant.")
    name: str = Field(description="Name of the tenant.")
    created_at: float = Field(description="When it was created, in seconds since the epoch.")
    weight: float = Field(
        default=1.0, description="Share of the training pool, relative to the weights of other tenants."
    )
    max_running: int | None = Field(default=None, description="Maximum number of jobs that run at the same time.")
    max_queued: int | None = Field(default=None, description="Maximum number of queued and paused jobs.")
    running: int = Field(default=0, description="Number of running jobs.")
    waiting: int = Field(default=0, description="Number of queued and paused jobs.")


class KeyRecord(FrozenModel):
    """An API key as it is stored: with the hash of its secret, never the secret."""

    id: str = Field(description="ID of the key.")
    tenant: str | None = Field(description="Tenant of the key. Null for an admin's key.")
    hint: str = Field(description="Last four characters of the secret.")
    created_at: float = Field(description="When it was created, in seconds since the epoch.")
    revoked_at: float | None = Field(default=None, description="When it was revoked, in seconds since the epoch.")
    expires_at: float | None = Field(default=None, description="Expiry time. Null: never.")
    scopes: tuple[Scope, ...] = Field(default=tuple(Scope), description="What it may be used for.")

    @field_validator("scopes", mode="before")
    @classmethod
    def _split_scopes(cls, value: object) -> object:
        return value.split() if isinstance(value, str) else value  # as the database and OAuth write them


class UsageRecord(FrozenModel):
    """Requests and tokens of a tenant on one day (UTC, such as 2026-01-31), for a base or an adapter's version."""

    day: str = Field(description="Day (UTC), such as 2026-01-31.")
    tenant: str | None = Field(description="Tenant of the requests. Null: an admin, for no tenant.")
    model: str = Field(description="Name of the base, or tenant/adapter.")
    version: str | None = Field(description="Version of the adapter. Null: the base model.")
    requests: int = Field(description="Number of requests.")
    prompt_tokens: int = Field(description="Number of tokens in prompts.")
    completion_tokens: int = Field(description="Number of generated tokens.")


@dataclass(frozen=True, slots=True)
class RateWindow:
    """Requests and tokens of a tenant at one gateway, in one minute and the minute before.

    Attributes:
        minute: number of the minute since the epoch.
        tokens: tokens of the requests that have ended.
        reserved_tokens: maximum number of tokens that the `running_requests` can still use.
    """

    minute: int
    requests: int = 0
    previous_requests: int = 0
    tokens: int = 0
    previous_tokens: int = 0
    running_requests: int = 0
    reserved_tokens: int = 0


class AuditRecord(FrozenModel):
    """One change that was made through the API."""

    id: str = Field(description="ID of the change.")
    created_at: float = Field(description="When it was made, in seconds since the epoch.")
    tenant: str | None = Field(description="Tenant that owns what changed. Null: no tenant.")
    actor: str | None = Field(description="Tenant whose key was used. Null: an admin's key.")
    key: str = Field(description="ID of the API key, or nightly.")
    action: str = Field(description='Action, such as "adapter.promote".')
    subject: str = Field(description="Name or ID of what changed.")
    details: dict[str, Any] = Field(default_factory=dict, description="More about the change, by name.")
    request: str = Field(
        description="ID of the request, as in the x-request-id header and the access log, or of the nightly run."
    )
