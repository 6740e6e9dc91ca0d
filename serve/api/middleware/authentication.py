"""Authentication: the API key of a request, the tenant it acts for, and the scopes that each endpoint needs.

Authorization consists of the methods of `Caller` alone.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loramill.errors import Forbidden, InvalidRequest, LoramillError, Unauthenticated
from loramill.registry import Registry, api_keys, tenants
from loramill.serve.api import docs
from loramill.serve.api.cache import ReadThroughCache
from loramill.serve.api.errors import error_response
from loramill.submission.submit import Submitter
from loramill.types import KeyRecord, Limits
from loramill.types import Scope as KeyScope

#: Paths that need no API key.
OPEN_PATHS = docs.PATHS | {"/health", "/healthz", "/readyz"}

#: Scope of the endpoints by the beginning of their path. A GET also accepts the scope `read`.
_SCOPE_BY_PREFIX = (
    ("/v1/chat", KeyScope.INFERENCE),
    ("/v1/completions", KeyScope.INFERENCE),
    ("/v1/feedback", KeyScope.INFERENCE),
    ("/v1/models", KeyScope.INFERENCE),
    ("/v1/files", KeyScope.TRAINING),
    ("/v1/fine_tuning", KeyScope.TRAINING),
    ("/v1/adapters", KeyScope.ADAPTERS),
)


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated API key and the tenant it acts for.

    Attributes:
        key_id: id of the key.
        admin: whether it is an admin key, which may do everything.
        tenant: the key's tenant, or the one that an admin names in `OpenAI-Organization`; None: no tenant.
        scopes: what the key may be used for.
        limits: the limits of the key's tenant; admin keys have none.
        request_id: id of this request.
    """

    key_id: str
    admin: bool
    tenant: str | None
    scopes: frozenset[KeyScope] = frozenset(KeyScope)
    limits: Limits | None = None
    request_id: str = ""

    @property
    def submitter(self) -> Submitter:
        """The caller as the author of a job."""
        return Submitter(None if self.admin else self.tenant, self.key_id, self.request_id)

    def require_tenant(self) -> str:
        """Returns the tenant that will own what this request creates.

        Raises:
            InvalidRequest: an admin key without a tenant.
        """
        if self.tenant is None:
            raise InvalidRequest(
                "An admin key has no tenant of its own: name one in the header OpenAI-Organization "
                '(in Python: OpenAI(organization="acme")).'
            )
        return self.tenant

    def check_adapter(self, tenant: str) -> None:
        """Raises Forbidden unless the caller may use adapters of `tenant`. Existing or not makes no difference."""
        if not self.admin and self.tenant != tenant:
            raise Forbidden("This key can only use the base model and the adapters of its own tenant.")

    def check_tenant(self, tenant: str) -> None:
        """Raises Forbidden unless the caller may read data about `tenant`. Existing or not makes no difference."""
        if not self.admin and self.tenant != tenant:
            raise Forbidden("This key can only read data about its own tenant.")

    def check_admin(self) -> None:
        """Raises Forbidden unless it is an admin key."""
        if not self.admin:
            raise Forbidden("This requires an admin key.")

    def check_scopes(self, accepted: Sequence[KeyScope]) -> None:
        """Raises Forbidden unless the key has one of these scopes."""
        if not self.admin and self.scopes.isdisjoint(accepted):
            names = " or ".join(f"'{scope}'" for scope in accepted)
            raise Forbidden(f"This key does not have the scope {names}; ask an admin for a key that has it.")


def accepted_scopes(method: str, path: str) -> tuple[KeyScope, ...]:
    """The scopes of which a key needs one, the most fitting first.

    All other endpoints are for reading, unless they require an admin key.
    """
    scope = next(
        (scope for prefix, scope in _SCOPE_BY_PREFIX if path == prefix or path.startswith(f"{prefix}/")), KeyScope.READ
    )
    if method == "DELETE" and path.startswith("/v1/models/"):
        scope = KeyScope.ADAPTERS  # the models that can be deleted are adapters
    if path.startswith("/v1/adapters/") and path.endswith("/data"):
        scope = KeyScope.TRAINING
    return (scope, KeyScope.READ) if method in ("GET", "HEAD") and scope is not KeyScope.READ else (scope,)


@dataclass(frozen=True, slots=True)
class _KnownKey:
    """A key in the registry, and the limits of its tenant."""

    key: KeyRecord
    limits: Limits | None


class AuthenticationMiddleware:
    """Looks API keys up, and rejects requests without a valid key. A revoked key is rejected within half a second.

    While the database is unavailable, keys that were read less than `grace_seconds` ago are accepted.
    """

    def __init__(self, app: ASGIApp, *, registry: Registry, grace_seconds: float = 0.0) -> None:
        self.app = app
        self._keys: ReadThroughCache[tuple[str, str | None], _KnownKey]
        self._keys = ReadThroughCache(
            registry, lambda session, key: _find_key(session, *key), grace_seconds=grace_seconds
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its `Caller` in `state.caller`, or responds with 401, 403 or 404."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            try:
                secret = _read_secret(headers.get("authorization", ""))
                organization = headers.get("openai-organization") or None
                known = await self._keys.get((api_keys.hash_secret(secret), organization))
                caller = _resolve_caller(known, organization, scope["state"]["request_id"])
                caller.check_scopes(accepted_scopes(scope["method"], scope["path"]))
            except LoramillError as error:
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["caller"] = caller
        await self.app(scope, receive, send)


def _find_key(session: Session, digest: str, organization: str | None) -> _KnownKey:
    """Looks a key up.

    Raises:
        Unauthenticated: the key is unknown, expired or revoked.
        NotFound: an admin key acts for a tenant that does not exist.
    """
    key = api_keys.find_by_digest(session, digest)
    if key.tenant is not None:
        return _KnownKey(key, tenants.get(session, key.tenant))
    if organization is not None:
        tenants.get(session, organization)
    return _KnownKey(key, None)


def _resolve_caller(known: _KnownKey, organization: str | None, request_id: str) -> Caller:
    """Returns the caller that a key belongs to.

    Raises:
        Unauthenticated: the key expired since it was read.
        Forbidden: a tenant's key names another tenant.
    """
    key = api_keys.check_not_expired(known.key)
    if key.tenant is None:
        return Caller(key.id, admin=True, tenant=organization, request_id=request_id)
    if organization not in (None, key.tenant):
        raise Forbidden("This key may not act for that organization; omit OpenAI-Organization.")
    return Caller(key.id, False, key.tenant, frozenset(key.scopes), known.limits, request_id)


def _read_secret(authorization: str) -> str:
    """Reads a key as OpenAI's clients send it, or as the password of a URL such as `http://key:lm-…@host`."""
    scheme, _, secret = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            secret = base64.b64decode(secret, validate=True).decode().partition(":")[2]
        except ValueError:  # not base64, or not text
            secret = ""
    if scheme.lower() not in ("bearer", "basic") or not secret.strip():
        raise Unauthenticated("The request has no API key: send one as `Authorization: Bearer lm-…`.")
    return secret.strip()
