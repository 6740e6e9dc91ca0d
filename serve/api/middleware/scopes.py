"""Which scope of a key each endpoint takes: a table, looked up before anything else is looked at."""

from __future__ import annotations

from loramill.types import Scope

#: By the path's beginning; reading there takes the same scope, or `read`.
_SCOPE_BY_PREFIX = (
    ("/v1/chat", Scope.INFERENCE),
    ("/v1/completions", Scope.INFERENCE),
    ("/v1/models", Scope.INFERENCE),
    ("/v1/files", Scope.TRAINING),
    ("/v1/fine_tuning", Scope.TRAINING),
    ("/v1/adapters", Scope.ADAPTERS),
)


def accepted_scopes(method: str, path: str) -> tuple[Scope, ...]:
    """The scopes of which a key needs one, the one to ask for first.

    Whatever isn't in the table is an admin's to change; a tenant may only read there.
    """
    room = next(
        (scope for start, scope in _SCOPE_BY_PREFIX if path == start or path.startswith(f"{start}/")), Scope.READ
    )
    if method == "DELETE" and room is Scope.INFERENCE:
        room = Scope.ADAPTERS  # a model that can be deleted is an adapter
    if path.startswith("/v1/adapters/") and path.endswith("/data"):
        room = Scope.TRAINING
    return (room, Scope.READ) if method in ("GET", "HEAD") and room is not Scope.READ else (room,)
