"""API keys. The database holds the SHA-256 of a secret: 256 random bits need neither a salt nor a slow hash."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest, NotFound, Unauthenticated
from loramill.registry import tenants
from loramill.registry.database.tables import KeyRow
from loramill.types import KeyRecord, Scope


def create(
    session: Session, tenant: str | None, *, scopes: Iterable[Scope] = tuple(Scope), expires_at: float | None = None
) -> tuple[KeyRecord, str]:
    """Creates a key for a tenant, or for an admin (None); returns it with its secret, which is not stored.

    Raises:
        NotFound: there is no such tenant.
        InvalidRequest: there is no scope, or the expiry time is in the past.
    """
    if tenant is not None:
        tenants.get(session, tenant)
    granted = frozenset(scopes)
    if not granted:
        raise InvalidRequest(f"A key needs at least one scope of {', '.join(Scope)}.", param="scopes")
    if expires_at is not None and expires_at <= time.time():
        raise InvalidRequest("The expiry time is in the past; give a time in the future.", param="expires_at")
    secret = f"lm-{secrets.token_urlsafe(32)}"
    row = KeyRow(
        id=f"key-{secrets.token_hex(12)}",
        tenant=tenant,
        digest=hash_secret(secret),
        hint=secret[-4:],
        created_at=time.time(),
        expires_at=expires_at,
        scopes=" ".join(scope for scope in Scope if scope in granted),
    )
    session.add(row)
    session.flush()
    return KeyRecord.model_validate(row), secret


def authenticate(session: Session, secret: str) -> KeyRecord:
    """Returns the key with this secret.

    Raises:
        Unauthenticated: the secret is unknown, or its key has expired or was revoked.
    """
    return find_by_digest(session, hash_secret(secret))


def find_by_digest(session: Session, digest: str) -> KeyRecord:
    """Returns the key whose secret has this SHA-256.

    Raises:
        Unauthenticated: the secret is unknown, or its key has expired or was revoked.
    """
    row = session.scalar(select(KeyRow).where(KeyRow.digest == digest, KeyRow.revoked_at.is_(None)))
    if row is None:
        raise _invalid_key()
    return check_not_expired(KeyRecord.model_validate(row))


def check_not_expired(key: KeyRecord) -> KeyRecord:
    """Returns the same key.

    Raises:
        Unauthenticated: the key has expired.
    """
    if key.expires_at is not None and key.expires_at <= time.time():
        raise _invalid_key()
    return key


def list_keys(session: Session, tenant: str | None) -> list[KeyRecord]:
    """Returns the keys of a tenant, or all keys (None), oldest first."""
    statement = select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
    if tenant is not None:
        statement = statement.where(KeyRow.tenant == tenant)
    return [KeyRecord.model_validate(row) for row in session.scalars(statement)]


def get(session: Session, key_id: str) -> KeyRecord:
    """Returns the key with this ID.

    Raises:
        NotFound: there is no such key.
    """
    return KeyRecord.model_validate(_get_row(session, key_id))


def revoke(session: Session, key_id: str) -> KeyRecord:
    """Revokes a key immediately; a key that is already revoked does not change.

    Raises:
        NotFound: there is no such key.
    """
    row = _get_row(session, key_id)
    if row.revoked_at is None:
        row.revoked_at = time.time()
        session.flush()
    return KeyRecord.model_validate(row)


def _get_row(session: Session, key_id: str) -> KeyRow:
    row = session.get(KeyRow, key_id)
    if row is None:
        raise NotFound(f"There is no key '{key_id}'.", param="key")
    return row


def hash_secret(secret: str) -> str:
    """Returns the SHA-256 of a secret, as the database stores it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _invalid_key() -> Unauthenticated:
    return Unauthenticated(
        "The API key is unknown, has expired or was revoked; ask the operator of this service for another one."
    )
