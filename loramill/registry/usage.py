"""What tenants ask of the gateways: each day's sums, and the meters by which gateways share a tenant's limits.

A gateway writes its books page by page. The number of the last page is in the record with what was on it, so a page
that is written again, because nobody knows whether it was committed, counts once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace

from sqlalchemy import delete, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from loramill.registry.database.tables import GatewayRow, RateWindowRow, TableBase, TenantRow, UsageRow
from loramill.types import RateWindow, UsageRecord

#: Seconds after which nothing runs any more on a gateway that has been silent.
SILENT_SECONDS = 5.0
#: The tenant that has the usage of all deleted tenants; no tenant can have this name.
DELETED_TENANT = "(deleted)"


@dataclass(frozen=True, slots=True, order=True)
class UsageItem:
    """What a sum is of: as in `UsageRecord`, with empty texts for None."""

    tenant: str
    day: str
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class UsageCount:
    """What was asked."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: UsageCount) -> UsageCount:
        return UsageCount(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


def record_batch(
    session: Session,
    gateway: str,
    batch: int,
    counts: Mapping[UsageItem, UsageCount],
    windows: Mapping[str, RateWindow],
    *,
    now: float,
) -> None:
    """Writes a gateway's page: adds its counts, unless that page was written before, and sets its tenants' meters."""
    row = session.get(GatewayRow, gateway, with_for_update=True)
    if row is None:
        row = GatewayRow(id=gateway, last_seen_at=now, last_batch=0)
        session.add(row)
        session.flush()
    row.last_seen_at = now
    there = _existing_tenants(session, {item.tenant for item in counts} | windows.keys())
    if row.last_batch < batch:
        row.last_batch = batch
        sums: defaultdict[UsageItem, UsageCount] = defaultdict(UsageCount)
        for item, count in counts.items():
            sums[item if item.tenant in there or not item.tenant else anonymized(item)] += count
        add(session, sums)
    kept = [name for name in windows if name in there]
    _upsert(session, RateWindowRow, [{"gateway": gateway, "tenant": name, **asdict(windows[name])} for name in kept])


def anonymized(item: UsageItem) -> UsageItem:
    """What stays of an item when its tenant is deleted: the day, and whether it was for the base or an adapter."""
    return UsageItem(DELETED_TENANT, item.day, DELETED_TENANT if item.version else item.model, "")


def add(session: Session, counts: Mapping[UsageItem, UsageCount]) -> None:
    """Adds counts to the sums."""
    # In one order, so that two gateways never wait for each other.
    sums = [asdict(item) | asdict(counts[item]) for item in sorted(counts)]
    _upsert(session, UsageRow, sums, adding=True)


def peer_windows(session: Session, gateway: str, *, minute: int, now: float) -> dict[str, list[RateWindow]]:
    """The other gateways' meters that count in this minute, by tenant; nothing runs on those that are silent."""
    statement = (
        select(RateWindowRow, GatewayRow.last_seen_at)
        .join(GatewayRow, GatewayRow.id == RateWindowRow.gateway)
        .where(
            RateWindowRow.gateway != gateway,
            or_(RateWindowRow.minute >= minute - 1, RateWindowRow.running_requests > 0),
        )
    )
    found: defaultdict[str, list[RateWindow]] = defaultdict(list)
    for row, at in session.execute(statement):
        meter = RateWindow(**{name: getattr(row, name) for name in RateWindow.__slots__})
        found[row.tenant].append(
            meter if now - at <= SILENT_SECONDS else replace(meter, running_requests=0, reserved_tokens=0)
        )
    return dict(found)


def delete_silent_gateways(session: Session, before: float) -> None:
    """Removes gateways that have been silent since `before`, with their meters; their usage stays."""
    gone = select(GatewayRow.id).where(GatewayRow.last_seen_at < before)
    session.execute(delete(RateWindowRow).where(RateWindowRow.gateway.in_(gone)))
    session.execute(delete(GatewayRow).where(GatewayRow.last_seen_at < before))


def daily(session: Session, tenant: str | None, first: str, last: str) -> list[UsageRecord]:
    """What a tenant, or all and admins (None), asked from the day `first` to `last`, the newest day first."""
    statement = select(UsageRow).where(UsageRow.day.between(first, last))
    if tenant is not None:
        statement = statement.where(UsageRow.tenant == tenant)
    order = (UsageRow.day.desc(), UsageRow.tenant, UsageRow.model, UsageRow.version)
    return [_to_record(row) for row in session.scalars(statement.order_by(*order))]


def _existing_tenants(session: Session, names: Collection[str]) -> set[str]:
    """Those of the names that are tenants: one may have been deleted while a gateway counted for it."""
    return set(session.scalars(select(TenantRow.name).where(TenantRow.name.in_(names))))


def _upsert(session: Session, table: type[TableBase], rows: list[dict[str, object]], *, adding: bool = False) -> None:
    if not rows:
        return
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    insert = dialect.insert(table)
    key = [column.name for column in table.__table__.primary_key]
    values = {
        name: table.__table__.c[name] + insert.excluded[name] if adding else insert.excluded[name]
        for name in rows[0]
        if name not in key
    }
    session.execute(insert.on_conflict_do_update(index_elements=key, set_=values), rows)


def _to_record(row: UsageRow) -> UsageRecord:
    return UsageRecord(
        day=row.day,
        tenant=row.tenant or None,
        model=row.model,
        version=row.version or None,
        requests=row.requests,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
    )
