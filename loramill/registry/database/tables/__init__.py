"""The registry's tables.

Tenants, adapters and versions are identified by their names in the API, and datasets, jobs and keys by their IDs. Times
are seconds since the epoch. A change here needs a migration; a test compares the two.
"""

from loramill.registry.database.tables.adapters import (
    AdapterRow,
    AliasChangeRow,
    AliasRow,
    EvaluationRow,
    PrunedVersionRow,
    RolloutRow,
    VersionRow,
    VersionTrafficRow,
)
from loramill.registry.database.tables.base import TableBase
from loramill.registry.database.tables.feedback import CompletionRow, DeletedUserRow, FeedbackRow
from loramill.registry.database.tables.gateways import GatewayRow, RateWindowRow, UsageRow
from loramill.registry.database.tables.jobs import CheckpointRow, EventRow, JobRow, PoolGpuRow, WorkerSlotRow
from loramill.registry.database.tables.nightly import (
    AdapterContentRow,
    AdapterDataRow,
    NightlyAnswerRow,
    NightlyRunRow,
    NightlyStepRow,
    NightlyTimeRow,
    SourceFileRow,
)
from loramill.registry.database.tables.tenants import AuditRow, DatasetRow, KeyRow, TenantRow

__all__ = [
    "AdapterContentRow",
    "AdapterDataRow",
    "AdapterRow",
    "AliasChangeRow",
    "AliasRow",
    "AuditRow",
    "CheckpointRow",
    "CompletionRow",
    "DatasetRow",
    "DeletedUserRow",
    "EvaluationRow",
    "EventRow",
    "FeedbackRow",
    "GatewayRow",
    "JobRow",
    "KeyRow",
    "NightlyAnswerRow",
    "NightlyRunRow",
    "NightlyStepRow",
    "NightlyTimeRow",
    "PoolGpuRow",
    "PrunedVersionRow",
    "RateWindowRow",
    "RolloutRow",
    "SourceFileRow",
    "TableBase",
    "TenantRow",
    "UsageRow",
    "VersionRow",
    "VersionTrafficRow",
    "WorkerSlotRow",
]
