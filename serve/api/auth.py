"""Who is calling, and for which tenant. Authorization is `Caller`'s methods; nothing else decides it."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loramill.errors import Forbidden, InvalidRequest, LoramillError, Unauthenticated
from loramill.registry import Registry, keys, tenants
from loramill.serve.api.errors import error_response

#: Paths that need no key.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})


@dataclass(frozen=True, slots=True)
class Caller:
    """A key that was presented, and the tenant it acts for: its own, or the one an admin names (None: none)."""

    key: str
    admin: bool
    tenant: str | None

    def acting(self) -> str:
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

    def check_admin(self) -> None:
        """Raises Forbidden unless it is an admin's key."""
        if not self.admin:
            raise Forbidden("Only an admin's key may do this.")


class Authenticate:
    """Pure ASGI: finds the caller in the record (one indexed read, so a revoked key is refused at once)."""

    def __init__(self, app: ASGIApp, *, registry: Registry) -> None:
        self.app = app
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through with its `Caller` in the state, or answers 401, 403 or 404."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            try:
                secret = _secret(headers.get("authorization", ""))
                organization = headers.get("openai-organization") or None
                caller = await run_in_threadpool(identify, self._registry, secret, organization)
            except LoramillError as error:
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["caller"] = caller
        await self.app(scope, receive, send)


def identify(registry: Registry, secret: str, organization: str | None) -> Caller:
    """Looks a key up.

    Raises:
        Unauthenticated: it isn't known or was revoked.
        Forbidden: a tenant's key asks to act for another tenant.
        NotFound: an admin's key asks to act for a tenant that isn't there.
    """
    with registry.reading() as session:
        key = keys.authenticate(session, secret)
        if key.tenant is None:
            if organization is not None:
                tenants.get(session, organization)
            return Caller(key.id, admin=True, tenant=organization)
    if organization not in (None, key.tenant):
        raise Forbidden("This key may not act for that organization; leave OpenAI-Organization out.")
    return Caller(key.id, admin=False, tenant=key.tenant)


def _secret(authorization: str) -> str:
    scheme, _, secret = authorization.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthenticated("No API key was given: send it as `Authorization: Bearer lm-…`.")
    return secret.strip()
