"""Who is calling, and for which tenant. Authorization is `Caller`'s methods; nothing else decides it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loramill.errors import Forbidden, InvalidRequest, LoramillError, Unauthenticated
from loramill.registry import Registry, api_keys, tenants
from loramill.serve.api.cache import ReadThroughCache
from loramill.serve.api.errors import error_response
from loramill.serve.api.middleware import scopes
from loramill.submission.submit import Submitter
from loramill.types import KeyRecord, Limits
from loramill.types import Scope as KeyScope

#: Paths that need no key.
OPEN_PATHS = frozenset({"/", "/favicon.ico", "/health", "/healthz", "/readyz", "/openapi.json", "/docs"})


@dataclass(frozen=True, slots=True)
class Caller:
    """A key that was presented, and the tenant it acts for: its own, or the one an admin names (None: none).

    Attributes:
        limits: its tenant's; an admin has none, whomever it acts for.
        request: the id of this request.
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
        """The tenant that what is made now will belong to.

        Raises:
            InvalidRequest: an admin's key without a tenant.
        """
        if self.tenant is None:
            raise InvalidRequest(
                "An admin's key acts for a tenant here: name it in the header OpenAI-Organization "
                '(in Python: OpenAI(organization="acme")).'
            )
        return self.tenant

    def check_adapter(self, tenant: str) -> None:
        """Raises Forbidden unless the caller may use the adapters of `tenant`; looks nothing up, so tells nothing."""
        if not self.admin and self.tenant != tenant:
            raise Forbidden("This key may use the base and its own tenant's adapters only.")

    def check_tenant(self, tenant: str) -> None:
        """Raises Forbidden unless the caller may read what is kept about `tenant`; looks nothing up."""
        if not self.admin and self.tenant != tenant:
            raise Forbidden("This key may read about its own tenant only.")

    def check_admin(self) -> None:
        """Raises Forbidden unless it is an admin's key."""
        if not self.admin:
            raise Forbidden("Only an admin's key may do this.")

    def check_scopes(self, accepted: Sequence[KeyScope]) -> None:
        """Raises Forbidden unless the key has one of these scopes."""
        if not self.admin and self.scopes.isdisjoint(accepted):
            wanted = " or ".join(f"'{scope}'" for scope in accepted)
            raise Forbidden(f"This key lacks the scope {wanted}; ask an admin for a key that has it.")


@dataclass(frozen=True, slots=True)
class _KnownKey:
    """What the record says of a key, and of the limits of its tenant."""

    key: KeyRecord
    limits: Limits | None


class AuthenticationMiddleware:
    """Pure ASGI: finds the caller in the record, where a key that was revoked is refused within half a second.

    While the database is away, keys that were read less than `grace` seconds ago are accepted.
    """

    def __init__(self, app: ASGIApp, *, registry: Registry, grace_seconds: float = 0.0) -> None:
        self.app = app
        self._keys: ReadThroughCache[tuple[str, str | None], _KnownKey]
        self._keys = ReadThroughCache(
            registry, lambda session, asked: _find_key(session, *asked), grace_seconds=grace_seconds
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through with its `Caller` in the state, or answers 401, 403 or 404."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            try:
                secret = _read_secret(headers.get("authorization", ""))
                organization = headers.get("openai-organization") or None
                known = await self._keys.get((api_keys.hash_secret(secret), organization))
                caller = _resolve_caller(known, organization, scope["state"]["request_id"])
                caller.check_scopes(scopes.accepted_scopes(scope["method"], scope["path"]))
            except LoramillError as error:
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["caller"] = caller
        await self.app(scope, receive, send)


def _find_key(session: Session, digest: str, organization: str | None) -> _KnownKey:
    """Looks a key up.

    Raises:
        Unauthenticated: it isn't known, has expired or was revoked.
        NotFound: an admin's key asks to act for a tenant that isn't there.
    """
    key = api_keys.find_by_digest(session, digest)
    if key.tenant is not None:
        return _KnownKey(key, tenants.get(session, key.tenant))
    if organization is not None:
        tenants.get(session, organization)
    return _KnownKey(key, None)


def _resolve_caller(known: _KnownKey, organization: str | None, request: str) -> Caller:
    """Who calls with a key.

    Raises:
        Unauthenticated: it has expired meanwhile.
        Forbidden: a tenant's key asks to act for another tenant.
    """
    key = api_keys.check_not_expired(known.key)
    if key.tenant is None:
        return Caller(key.id, admin=True, tenant=organization, request_id=request)
    if organization not in (None, key.tenant):
        raise Forbidden("This key may not act for that organization; leave OpenAI-Organization out.")
    return Caller(key.id, False, key.tenant, frozenset(key.scopes), known.limits, request)


def _read_secret(authorization: str) -> str:
    """The key, as OpenAI's clients send it, or as the password of a URL such as `http://key:lm-…@host`."""
    scheme, _, said = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            said = base64.b64decode(said, validate=True).decode().partition(":")[2]
        except ValueError:  # neither base64 nor text
            said = ""
    if scheme.lower() not in ("bearer", "basic") or not said.strip():
        raise Unauthenticated("No API key was given: send it as `Authorization: Bearer lm-…`.")
    return said.strip()
