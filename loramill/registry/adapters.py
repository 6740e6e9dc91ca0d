"""Adapters, their versions, and the aliases that move between the versions.

An adapter with a published version has a champion; before that, it may have the versions of a running job's
checkpoints. The champion always differs from the previous champion and from the challenger. Moving an alias locks the
adapter's row, so that moves are serialized and recorded in their order. A rollout ends when an alias leaves the
versions that it compares.
"""

from __future__ import annotations

import time
from collections import defaultdict

from sqlalchemy import and_, delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.errors import Conflict, ModelNotFound, NotFound, VersionPruned
from loramill.names import SHORT_HASH_LENGTH, AdapterName, is_version
from loramill.registry import tenants
from loramill.registry.database.tables import (
    AdapterRow,
    AliasChangeRow,
    AliasRow,
    JobRow,
    PrunedVersionRow,
    VersionRow,
)
from loramill.registry.rollouts import records as rollouts
from loramill.types import AdapterRecord, Alias, AliasChange, RetentionPolicy, RolloutOutcome, VersionRecord


def get_or_create(session: Session, name: AdapterName) -> AdapterRecord:
    """Returns the adapter with this name; creates it if it does not exist.

    Raises:
        NotFound: there is no such tenant.
    """
    if session.get(AdapterRow, str(name)) is None:
        tenants.get(session, name.tenant)
        try:
            with session.begin_nested():
                session.add(AdapterRow(name=str(name), tenant=name.tenant, created_at=time.time()))
        except IntegrityError:
            session.expire_all()  # another writer created it in the meantime
    return get(session, name)


def get(session: Session, name: AdapterName | str) -> AdapterRecord:
    """Returns the adapter with this name.

    Raises:
        NotFound: the adapter does not exist.
    """
    row = session.get(AdapterRow, str(name))
    if row is None:
        raise NotFound(f"There is no adapter '{name}'.", param="adapter")
    return _to_record(row, _aliases(session, name))


def list_adapters(session: Session, tenant: str | None) -> list[AdapterRecord]:
    """Returns the adapters of a tenant, or all adapters (None), by name."""
    rows = select(AdapterRow).order_by(AdapterRow.name)
    pointers = select(AliasRow.adapter, AliasRow.alias, AliasRow.version)
    if tenant is not None:
        rows = rows.where(AdapterRow.tenant == tenant)
        pointers = pointers.join(AdapterRow, AdapterRow.name == AliasRow.adapter).where(AdapterRow.tenant == tenant)
    aliases: defaultdict[str, dict[Alias, str]] = defaultdict(dict)
    for adapter, alias, pointed in session.execute(pointers):
        aliases[adapter][alias] = pointed
    return [_to_record(row, aliases[row.name]) for row in session.scalars(rows)]


def get_version(session: Session, version_id: str) -> VersionRecord:
    """Returns the version with this full hash; the oldest one if several adapters share its content.

    Raises:
        NotFound: there is no such version.
    """
    statement = select(VersionRow).where(VersionRow.id == version_id).order_by(VersionRow.created_at).limit(1)
    row = session.scalar(statement)
    if row is None:
        raise NotFound(f"There is no version '{version_id}'.", param="version")
    return VersionRecord.model_validate(row)


def list_versions(session: Session, name: AdapterName | str) -> list[VersionRecord]:
    """Returns the versions of an adapter, newest first."""
    statement = select(VersionRow).where(VersionRow.adapter == str(name)).order_by(VersionRow.created_at.desc())
    return [VersionRecord.model_validate(row) for row in session.scalars(statement)]


def champion_ranks(session: Session, base: str) -> tuple[int, ...]:
    """Returns the ranks of the jobs that trained the champions of a base, given its fingerprint, in ascending order."""
    rank = JobRow.spec["rank"].as_integer()
    statement = (
        select(rank)
        .join(VersionRow, VersionRow.job == JobRow.id)
        .join(AliasRow, and_(AliasRow.adapter == VersionRow.adapter, AliasRow.version == VersionRow.id))
        .where(AliasRow.alias == Alias.CHAMPION, VersionRow.base == base)
        .distinct()
    )
    return tuple(sorted(found for found in session.scalars(statement) if found is not None))


def resolve(session: Session, name: AdapterName | str, selector: str) -> VersionRecord:
    """Returns the version that an alias points to, or whose hash begins with the selector (at least 8 hex digits).

    Raises:
        ModelNotFound: no version matches, or several do; VersionPruned if retention removed it.
    """
    model = f"The model '{name}@{selector}' does not exist"
    if selector in tuple(Alias):
        pointed = and_(AliasRow.adapter == VersionRow.adapter, AliasRow.version == VersionRow.id)
        alias = and_(AliasRow.adapter == str(name), AliasRow.alias == Alias(selector))
        row = session.scalar(select(VersionRow).join(AliasRow, pointed).where(alias))
        if row is None:
            found = _aliases(session, name)
            if not found and session.get(AdapterRow, str(name)) is None:
                raise ModelNotFound(f"{model}: there is no adapter '{name}'.", param="model")
            has = f"its aliases are {', '.join(sorted(found))}" if found else "it has no version yet"
            raise ModelNotFound(f"{model}: '{name}' has no {selector}; {has}.", param="model")
        return VersionRecord.model_validate(row)
    if not is_version(selector):
        raise ModelNotFound(
            f"{model}: write {', '.join(Alias)} or at least 8 hex digits of a version after the '@'.",
            param="model",
        )
    statement = select(VersionRow).where(VersionRow.adapter == str(name), VersionRow.id.startswith(selector)).limit(2)
    rows = session.scalars(statement).all()
    if len(rows) > 1:
        raise ModelNotFound(f"{model}: several versions begin with these digits; give more digits.", param="model")
    if not rows:
        _raise_if_pruned(session, name, selector, model)
        raise ModelNotFound(f"{model}: '{name}' has no version that begins with these digits.", param="model")
    return VersionRecord.model_validate(rows[0])


def add_version(session: Session, version: VersionRecord) -> Alias | None:
    """Records a version of an existing adapter: as champion if it is the first one, otherwise as challenger.

    Content that the adapter already has is not recorded twice.

    Returns:
        The alias that now points to the version; None if the version already was the champion.
    """
    aliases = _lock(session, version.adapter)
    if session.get(VersionRow, (version.adapter, version.id)) is None:
        session.add(VersionRow(**version.model_dump()))
        session.flush()
    if aliases.get(Alias.CHAMPION) == version.id:
        return None
    alias = Alias.CHALLENGER if Alias.CHAMPION in aliases else Alias.CHAMPION
    reason = f"published by {version.job}" if version.job else "imported"
    _move_alias(session, version.adapter, alias, version.id, reason)
    _end_rollout(session, version.adapter, reason)
    return alias


def move(session: Session, name: AdapterName | str, alias: Alias, version: str | None, reason: str) -> AdapterRecord:
    """Points challenger or previous to a version, or to no version (None).

    Raises:
        Conflict: the alias is champion, which only `promote` and `rollback` move, or the version is the champion.
        NotFound: the adapter or the version does not exist.
    """
    aliases = _lock(session, name)
    if alias is Alias.CHAMPION:
        raise Conflict("The champion is moved only by promote and rollback.", param="alias")
    if version is not None:
        _check_owned(session, name, version)
        if aliases.get(Alias.CHAMPION) == version:
            raise Conflict(f"{version[:SHORT_HASH_LENGTH]} is already the champion of '{name}'.", param="version")
    _move_alias(session, name, alias, version, reason)
    _end_rollout(session, name, reason)
    return get(session, name)


def promote(session: Session, name: AdapterName | str, version: str, reason: str) -> AdapterRecord:
    """Makes a version (given by its full hash) the champion; the current champion becomes previous.

    Raises:
        NotFound: the adapter or the version does not exist.
        Conflict: the adapter is pinned to another version.
    """
    aliases = _lock(session, name)
    _check_owned(session, name, version)
    champion = aliases.get(Alias.CHAMPION)
    if champion != version:
        check_not_pinned(session, name)
        _move_alias(session, name, Alias.PREVIOUS, champion, reason)
        _make_champion(session, name, version, aliases, reason)
        _end_rollout(session, name, reason)
    return get(session, name)


def rollback(session: Session, name: AdapterName | str, reason: str) -> AdapterRecord:
    """Swaps champion and previous; a second rollback undoes the first.

    Raises:
        NotFound: the adapter does not exist.
        Conflict: the adapter has no previous champion, or is pinned.
    """
    aliases = _lock(session, name)
    check_not_pinned(session, name)
    previous = aliases.get(Alias.PREVIOUS)
    if previous is None:
        raise Conflict(f"'{name}' has no previous champion to roll back to.")
    _move_alias(session, name, Alias.PREVIOUS, aliases.get(Alias.CHAMPION), reason)
    _make_champion(session, name, previous, aliases, reason)
    _end_rollout(session, name, reason)
    return get(session, name)


def pin(session: Session, name: AdapterName | str, version: str, reason: str) -> AdapterRecord:
    """Makes a version (given by its full hash) the champion until the adapter is unpinned.

    Raises:
        NotFound, Conflict: as in `promote`.
    """
    promote(session, name, version, reason)
    rollouts.end(session, name, RolloutOutcome.ENDED, reason)
    return _set_pinned(session, name, pinned=True)


def unpin(session: Session, name: AdapterName | str) -> AdapterRecord:
    """Allows the champion to change again.

    Raises:
        NotFound: the adapter does not exist.
    """
    _lock(session, name)
    return _set_pinned(session, name, pinned=False)


def set_retention(session: Session, name: AdapterName | str, policy: RetentionPolicy | None) -> AdapterRecord:
    """Gives an adapter a retention of its own, or that of the settings (None).

    Raises:
        NotFound: the adapter does not exist.
    """
    _lock(session, name)
    session.get_one(AdapterRow, str(name)).retention = None if policy is None else policy.model_dump(exclude_none=True)
    session.flush()
    return get(session, name)


def lock(session: Session, name: AdapterName | str) -> None:
    """Locks an adapter until the transaction ends, so that no one else can change or delete it.

    Raises:
        NotFound: the adapter does not exist.
    """
    _lock(session, name)


def check_not_pinned(session: Session, name: AdapterName | str) -> None:
    """Checks that the champion of an adapter may change.

    Raises:
        Conflict: the adapter is pinned.
    """
    if session.get_one(AdapterRow, str(name)).pinned:
        champion = _aliases(session, name)[Alias.CHAMPION]
        raise Conflict(
            f"'{name}' is pinned to its champion {champion[:SHORT_HASH_LENGTH]}; "
            f"`loramill adapters unpin {name}` allows it to change."
        )


def get_owned_version(session: Session, name: AdapterName | str, version: str) -> VersionRecord:
    """Returns the adapter's version with this full hash.

    Raises:
        NotFound: the adapter has no such version.
    """
    _check_owned(session, name, version)
    return VersionRecord.model_validate(session.get_one(VersionRow, (str(name), version)))


def alias_history(session: Session, name: AdapterName | str) -> list[AliasChange]:
    """Returns every move of an adapter's aliases, newest first."""
    statement = select(AliasChangeRow).where(AliasChangeRow.adapter == str(name)).order_by(AliasChangeRow.id.desc())
    return [AliasChange.model_validate(row) for row in session.scalars(statement)]


def _aliases(session: Session, name: AdapterName | str) -> dict[Alias, str]:
    pointers = select(AliasRow.alias, AliasRow.version).where(AliasRow.adapter == str(name))
    return dict(session.execute(pointers).tuples().all())


def _lock(session: Session, name: AdapterName | str) -> dict[Alias, str]:
    if session.get(AdapterRow, str(name), with_for_update=True) is None:
        raise NotFound(f"There is no adapter '{name}'.", param="adapter")
    return _aliases(session, name)


def _check_owned(session: Session, name: AdapterName | str, version: str) -> None:
    if session.get(VersionRow, (str(name), version)) is None:
        raise NotFound(f"'{name}' has no version '{version}'.", param="version")


def _raise_if_pruned(session: Session, name: AdapterName | str, digits: str, model: str) -> None:
    pruned = select(PrunedVersionRow).where(
        PrunedVersionRow.adapter == str(name), PrunedVersionRow.version.startswith(digits)
    )
    row = session.scalar(pruned.order_by(PrunedVersionRow.pruned_at.desc()).limit(1))
    if row is not None:
        day = time.strftime("%Y-%m-%d", time.gmtime(row.pruned_at))
        raise VersionPruned(
            f"{model} any more: retention removed it on {day}, since it was {row.reason}. Use an alias or another "
            f"version (`loramill adapters show {name}`), or train it again; `loramill adapters retention {name}` "
            "changes what is kept.",
            param="model",
        )


def _set_pinned(session: Session, name: AdapterName | str, *, pinned: bool) -> AdapterRecord:
    session.get_one(AdapterRow, str(name)).pinned = pinned
    session.flush()
    return get(session, name)


def _make_champion(
    session: Session, name: AdapterName | str, version: str, aliases: dict[Alias, str], reason: str
) -> None:
    _move_alias(session, name, Alias.CHAMPION, version, reason)
    if aliases.get(Alias.CHALLENGER) == version:
        _move_alias(session, name, Alias.CHALLENGER, None, reason)


def _move_alias(session: Session, name: AdapterName | str, alias: Alias, version: str | None, reason: str) -> None:
    pointer = (AliasRow.adapter == str(name), AliasRow.alias == alias)
    if session.scalar(select(AliasRow.version).where(*pointer)) == version:
        return
    session.execute(delete(AliasRow).where(*pointer))
    if version is not None:
        session.execute(insert(AliasRow).values(adapter=str(name), alias=alias, version=version))
    session.add(AliasChangeRow(adapter=str(name), alias=alias, version=version, reason=reason, created_at=time.time()))
    session.flush()


def _end_rollout(session: Session, name: AdapterName | str, reason: str) -> None:
    rollouts.end_if_moved(session, name, _aliases(session, name), reason)


def _to_record(row: AdapterRow, aliases: dict[Alias, str]) -> AdapterRecord:
    pointers = {alias.value: version for alias, version in aliases.items()}
    return AdapterRecord(
        name=row.name,
        tenant=row.tenant,
        created_at=row.created_at,
        pinned=row.pinned,
        retention=None if row.retention is None else RetentionPolicy.model_validate(row.retention),
        **pointers,
    )
