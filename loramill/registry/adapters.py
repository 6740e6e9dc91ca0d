"""Adapters, their versions, and the aliases that move between them.

An adapter with a published version has a champion; before, it may have those of a running job's checkpoints. Champion
and previous, champion and challenger always differ. Whoever moves an alias holds the adapter's row, so moves come one
after another and their history is their order.
"""

from __future__ import annotations

import time
from collections import defaultdict

from sqlalchemy import and_, delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from loramill.errors import Conflict, ModelNotFound, NotFound
from loramill.names import SHORT_HASH_LENGTH, AdapterName, is_version
from loramill.registry import tenants
from loramill.registry.database.tables import AdapterRow, AliasChangeRow, AliasRow, VersionRow
from loramill.types import AdapterRecord, Alias, AliasChange, VersionRecord


def get_or_create(session: Session, name: AdapterName) -> AdapterRecord:
    """The adapter of this name, made if there is none.

    Raises:
        NotFound: there is no such tenant.
    """
    if session.get(AdapterRow, str(name)) is None:
        tenants.get(session, name.tenant)
        try:
            with session.begin_nested():
                session.add(AdapterRow(name=str(name), tenant=name.tenant, created_at=time.time()))
        except IntegrityError:
            session.expire_all()  # another writer made it meanwhile
    return get(session, name)


def get(session: Session, name: AdapterName | str) -> AdapterRecord:
    """The adapter of this name, with where its aliases point.

    Raises:
        NotFound: there is none.
    """
    row = session.get(AdapterRow, str(name))
    if row is None:
        raise NotFound(f"There is no adapter '{name}'.", param="adapter")
    return _to_record(row, _aliases(session, name))


def list_adapters(session: Session, tenant: str | None) -> list[AdapterRecord]:
    """The adapters of a tenant, or all (None), by name."""
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
    """The version of this full hash. Where adapters share the content, the first to have had it.

    Raises:
        NotFound: there is none.
    """
    statement = select(VersionRow).where(VersionRow.id == version_id).order_by(VersionRow.created_at).limit(1)
    row = session.scalar(statement)
    if row is None:
        raise NotFound(f"There is no version '{version_id}'.", param="version")
    return VersionRecord.model_validate(row)


def list_versions(session: Session, name: AdapterName | str) -> list[VersionRecord]:
    """The versions of an adapter, newest first."""
    statement = select(VersionRow).where(VersionRow.adapter == str(name)).order_by(VersionRow.created_at.desc())
    return [VersionRecord.model_validate(row) for row in session.scalars(statement)]


def resolve(session: Session, name: AdapterName | str, selector: str) -> VersionRecord:
    """The version that an alias points to, or whose hash begins with the selector (at least 8 hex digits).

    Raises:
        ModelNotFound: there is none, or more than one.
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
            f"{model}: after the '@' comes {', '.join(Alias)} or the first 8 or more hex digits of a version.",
            param="model",
        )
    statement = select(VersionRow).where(VersionRow.adapter == str(name), VersionRow.id.startswith(selector)).limit(2)
    rows = session.scalars(statement).all()
    if len(rows) > 1:
        raise ModelNotFound(f"{model}: more than one version begins so; write more of its digits.", param="model")
    if not rows:
        raise ModelNotFound(f"{model}: '{name}' has no version that begins so.", param="model")
    return VersionRecord.model_validate(rows[0])


def add_version(session: Session, record: VersionRecord) -> Alias | None:
    """Records a version of an adapter that exists: as champion if it is the first, else as challenger.

    Content that the adapter has already isn't recorded twice. Returns the alias that now points to it, None if
    it was the champion and stays so.
    """
    held = _lock(session, record.adapter)
    if session.get(VersionRow, (record.adapter, record.id)) is None:
        session.add(VersionRow(**record.model_dump()))
        session.flush()
    if held.get(Alias.CHAMPION) == record.id:
        return None
    alias = Alias.CHALLENGER if Alias.CHAMPION in held else Alias.CHAMPION
    _move_alias(session, record.adapter, alias, record.id, f"published by {record.job}" if record.job else "imported")
    return alias


def move(session: Session, name: AdapterName | str, alias: Alias, version: str | None, reason: str) -> AdapterRecord:
    """Points challenger or previous to a version, or to nothing (None).

    Raises:
        Conflict: the alias is champion, which only `promote` and `rollback` move, or the version is the champion.
        NotFound: there is no such adapter, or it has no such version.
    """
    held = _lock(session, name)
    if alias is Alias.CHAMPION:
        raise Conflict("The champion moves by promote or rollback only.", param="alias")
    if version is not None:
        _check_owned(session, name, version)
        if held.get(Alias.CHAMPION) == version:
            raise Conflict(f"{version[:SHORT_HASH_LENGTH]} is the champion of '{name}' already.", param="version")
    _move_alias(session, name, alias, version, reason)
    return get(session, name)


def promote(session: Session, name: AdapterName | str, version: str, reason: str) -> AdapterRecord:
    """Makes a version (its full hash) the champion; the champion until now becomes previous.

    Raises:
        NotFound: there is no such adapter, or it has no such version.
        Conflict: the adapter is pinned to another.
    """
    held = _lock(session, name)
    _check_owned(session, name, version)
    champion = held.get(Alias.CHAMPION)
    if champion != version:
        _check_not_pinned(session, name)
        _move_alias(session, name, Alias.PREVIOUS, champion, reason)
        _make_champion(session, name, version, held, reason)
    return get(session, name)


def rollback(session: Session, name: AdapterName | str, reason: str) -> AdapterRecord:
    """Swaps champion and previous; a second rollback undoes the first.

    Raises:
        NotFound: there is no such adapter.
        Conflict: it has no previous champion, or is pinned to the one that it has.
    """
    held = _lock(session, name)
    _check_not_pinned(session, name)
    previous = held.get(Alias.PREVIOUS)
    if previous is None:
        raise Conflict(f"'{name}' has no previous champion to roll back to.")
    _move_alias(session, name, Alias.PREVIOUS, held.get(Alias.CHAMPION), reason)
    _make_champion(session, name, previous, held, reason)
    return get(session, name)


def pin(session: Session, name: AdapterName | str, version: str, reason: str) -> AdapterRecord:
    """Makes a version (its full hash) the champion, which from then on stays it until the adapter is unpinned.

    Raises:
        NotFound, Conflict: as `promote`.
    """
    promote(session, name, version, reason)
    return _set_pinned(session, name, pinned=True)


def unpin(session: Session, name: AdapterName | str) -> AdapterRecord:
    """Lets the champion change again.

    Raises:
        NotFound: there is no such adapter.
    """
    _lock(session, name)
    return _set_pinned(session, name, pinned=False)


def lock(session: Session, name: AdapterName | str) -> None:
    """Locks an adapter until the transaction ends, so that no one else changes or deletes it.

    Raises:
        NotFound: there is none.
    """
    _lock(session, name)


def get_owned_version(session: Session, name: AdapterName | str, version: str) -> VersionRecord:
    """The version of this full hash, if the adapter has it.

    Raises:
        NotFound: it has none.
    """
    _check_owned(session, name, version)
    return VersionRecord.model_validate(session.get_one(VersionRow, (str(name), version)))


def alias_history(session: Session, name: AdapterName | str) -> list[AliasChange]:
    """Every move of an adapter's aliases, newest first."""
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


def _check_not_pinned(session: Session, name: AdapterName | str) -> None:
    if session.get_one(AdapterRow, str(name)).pinned:
        champion = _aliases(session, name)[Alias.CHAMPION]
        raise Conflict(
            f"'{name}' is pinned to its champion {champion[:SHORT_HASH_LENGTH]}: `loramill adapters unpin {name}` "
            "lets it change."
        )


def _set_pinned(session: Session, name: AdapterName | str, *, pinned: bool) -> AdapterRecord:
    session.get_one(AdapterRow, str(name)).pinned = pinned
    session.flush()
    return get(session, name)


def _make_champion(
    session: Session, name: AdapterName | str, version: str, held: dict[Alias, str], reason: str
) -> None:
    _move_alias(session, name, Alias.CHAMPION, version, reason)
    if held.get(Alias.CHALLENGER) == version:
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


def _to_record(row: AdapterRow, aliases: dict[Alias, str]) -> AdapterRecord:
    pointers = {alias.value: version for alias, version in aliases.items()}
    return AdapterRecord(name=row.name, tenant=row.tenant, created_at=row.created_at, pinned=row.pinned, **pointers)
