"""API keys. The record holds the sha256 of a secret: 256 random bits need no salt and no slow hash."""

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
    """Makes a key for a tenant, or an admin's (None); returns it with its secret, which is shown only now.

    Raises:
        NotFound: there is no such tenant.
        InvalidRequest: it would have no scope, or have expired already.
    """
    if tenant is not None:
        tenants.get(session, tenant)
    asked = frozenset(scopes)
    if not asked:
        raise InvalidRequest(
            f"A key without a scope is good for nothing; give some of {', '.join(Scope)}.", param="scopes"
        )
    if expires_at is not None and expires_at <= time.time():
        raise InvalidRequest("The key would have expired already; give a time to come.", param="expires_at")
    secret = f"lm-{secrets.token_urlsafe(32)}"
    row = KeyRow(
        id=f"key-{secrets.token_hex(12)}",
        tenant=tenant,
        digest=hash_secret(secret),
        hint=secret[-4:],
        created_at=time.time(),
        expires_at=expires_at,
        scopes=" ".join(scope for scope in Scope if scope in asked),
    )
    session.add(row)
    session.flush()
    return KeyRecord.model_validate(row), secret


def authenticate(session: Session, secret: str) -> KeyRecord:
    """The key that a secret opens.

    Raises:
        Unauthenticated: the secret is unknown, or its key has expired or was revoked.
    """
    return find_by_digest(session, hash_secret(secret))


def find_by_digest(session: Session, digest: str) -> KeyRecord:
    """The key that the secret with this digest opens.

    Raises:
        Unauthenticated: as `authenticate`.
    """
    row = session.scalar(select(KeyRow).where(KeyRow.digest == digest, KeyRow.revoked_at.is_(None)))
    if row is None:
        raise _invalid_key()
    return check_not_expired(KeyRecord.model_validate(row))


def check_not_expired(key: KeyRecord) -> KeyRecord:
    """The same key, unless it has expired.

    Raises:
        Unauthenticated: it has.
    """
    if key.expires_at is not None and key.expires_at <= time.time():
        raise _invalid_key()
    return key


def list_keys(session: Session, tenant: str | None) -> list[KeyRecord]:
    """The keys of a tenant, or all keys (None), oldest first."""
    statement = select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
    if tenant is not None:
        statement = statement.where(KeyRow.tenant == tenant)
    return [KeyRecord.model_validate(row) for row in session.scalars(statement)]


def get(session: Session, key_id: str) -> KeyRecord:
    """The key of this id.

    Raises:
        NotFound: there is none.
    """
    return KeyRecord.model_validate(_get_row(session, key_id))


def revoke(session: Session, key_id: str) -> KeyRecord:
    """Ends a key from this moment; one that was revoked stays as it is.

    Raises:
        NotFound: there is none of this id.
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
    """What the record keeps of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _invalid_key() -> Unauthenticated:
    return Unauthenticated(
        "The API key is not known, has expired or was revoked; ask whoever runs this service for another."
    )
