"""Usage per day, and the rate windows through which gateways share a tenant's limits.

A gateway writes its usage in numbered batches. The number of the last batch is stored in the same transaction, so that
a batch that is written again, because it is not known whether it was committed, counts once.
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

#: Time after which a silent gateway is assumed to run no requests.
SILENT_SECONDS = 5.0
#: Tenant of the usage of all deleted tenants; it is not a valid tenant name.
DELETED_TENANT = "(deleted)"


@dataclass(frozen=True, slots=True, order=True)
class UsageItem:
    """Key of a sum, as in `UsageRecord`, with empty strings instead of None."""

    tenant: str
    day: str
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class UsageCount:
    """Number of requests and of tokens."""

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
    """Adds the counts of a gateway's batch, unless it was written before, and sets the rate windows of its tenants."""
    row = session.get(GatewayRow, gateway, with_for_update=True)
    if row is None:
        row = GatewayRow(id=gateway, last_seen_at=now, last_batch=0)
        session.add(row)
        session.flush()
    row.last_seen_at = now
    existing = _existing_tenants(session, {item.tenant for item in counts} | windows.keys())
    if row.last_batch < batch:
        row.last_batch = batch
        sums: defaultdict[UsageItem, UsageCount] = defaultdict(UsageCount)
        for item, count in counts.items():
            sums[item if item.tenant in existing or not item.tenant else anonymized(item)] += count
        add(session, sums)
    _upsert(
        session,
        RateWindowRow,
        [{"gateway": gateway, "tenant": name, **asdict(windows[name])} for name in windows if name in existing],
    )


def anonymized(item: UsageItem) -> UsageItem:
    """Returns the key of an item after its tenant was deleted: the day, and the base unless it was an adapter."""
    return UsageItem(DELETED_TENANT, item.day, DELETED_TENANT if item.version else item.model, "")


def add(session: Session, counts: Mapping[UsageItem, UsageCount]) -> None:
    """Adds counts to the sums per day."""
    # Sorted, so that two gateways cannot deadlock.
    sums = [asdict(item) | asdict(counts[item]) for item in sorted(counts)]
    _upsert(session, UsageRow, sums, adding=True)


def peer_windows(session: Session, gateway: str, *, minute: int, now: float) -> dict[str, list[RateWindow]]:
    """Returns the rate windows of the other gateways that count in this minute, by tenant.

    A silent gateway is assumed to run no requests.
    """
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
        window = RateWindow(**{name: getattr(row, name) for name in RateWindow.__slots__})
        found[row.tenant].append(
            window if now - at <= SILENT_SECONDS else replace(window, running_requests=0, reserved_tokens=0)
        )
    return dict(found)


def delete_silent_gateways(session: Session, before: float) -> None:
    """Deletes gateways that have been silent since `before`, with their rate windows; their usage stays."""
    silent = select(GatewayRow.id).where(GatewayRow.last_seen_at < before)
    session.execute(delete(RateWindowRow).where(RateWindowRow.gateway.in_(silent)))
    session.execute(delete(GatewayRow).where(GatewayRow.last_seen_at < before))


def daily(session: Session, tenant: str | None, first: str, last: str) -> list[UsageRecord]:
    """Returns the usage of a tenant, or of everyone (None), from day `first` to day `last`, newest day first."""
    statement = select(UsageRow).where(UsageRow.day.between(first, last))
    if tenant is not None:
        statement = statement.where(UsageRow.tenant == tenant)
    order = (UsageRow.day.desc(), UsageRow.tenant, UsageRow.model, UsageRow.version)
    return [_to_record(row) for row in session.scalars(statement.order_by(*order))]


def _existing_tenants(session: Session, names: Collection[str]) -> set[str]:
    """Returns the names that are tenants: a tenant may have been deleted while a gateway counted its usage."""
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
