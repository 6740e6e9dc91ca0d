"""Frozen values that cross package boundaries.

Times are seconds since the epoch (UTC). IDs have a prefix for their kind, as in OpenAI's API (`file-…`, `ftjob-…`,
`key-…`); versions, artifacts and bases are identified by a SHA-256 in hex.
"""

from loramill.types.adapters import AdapterRecord, Alias, AliasChange, DeletionSummary, VersionRecord
from loramill.types.base import FrozenModel
from loramill.types.datasets import DatasetRecord
from loramill.types.devices import GpuInfo
from loramill.types.evaluations import Candidate, EvaluationRecord, ExampleResult
from loramill.types.feedback import (
    CompletionDeletion,
    CompletionKind,
    CompletionRecord,
    CompletionStorage,
    FeedbackRecord,
    Rating,
)
from loramill.types.jobs import (
    ALL_LINEAR,
    ATTENTION_TARGETS,
    METHODS,
    TARGETS,
    CheckpointRecord,
    Executor,
    JobEvent,
    JobRecord,
    JobSpec,
    JobStatus,
    Method,
    Objective,
    PendingAction,
    Quantization,
    Schedule,
    ServedQuantization,
    TrainOn,
)
from loramill.types.nightly import (
    AdapterData,
    ContentRecord,
    ContentSide,
    NewData,
    NewDataState,
    NightlyRun,
    NightlyStep,
    ScheduledTime,
    SetAsideData,
    StepStatus,
)
from loramill.types.retention import Removal, RetentionPolicy
from loramill.types.sweeps import CandidateState, SweepCandidate
from loramill.types.tenants import AuditRecord, KeyRecord, Limits, RateWindow, Scope, TenantRecord, UsageRecord

__all__ = [
    "ALL_LINEAR",
    "ATTENTION_TARGETS",
    "METHODS",
    "TARGETS",
    "AdapterData",
    "AdapterRecord",
    "Alias",
    "AliasChange",
    "AuditRecord",
    "Candidate",
    "CandidateState",
    "CheckpointRecord",
    "CompletionDeletion",
    "CompletionKind",
    "CompletionRecord",
    "CompletionStorage",
    "ContentRecord",
    "ContentSide",
    "DatasetRecord",
    "DeletionSummary",
    "EvaluationRecord",
    "ExampleResult",
    "Executor",
    "FeedbackRecord",
    "FrozenModel",
    "GpuInfo",
    "JobEvent",
    "JobRecord",
    "JobSpec",
    "JobStatus",
    "KeyRecord",
    "Limits",
    "Method",
    "NewData",
    "NewDataState",
    "NightlyRun",
    "NightlyStep",
    "Objective",
    "PendingAction",
    "Quantization",
    "RateWindow",
    "Rating",
    "Removal",
    "RetentionPolicy",
    "Schedule",
    "ScheduledTime",
    "Scope",
    "ServedQuantization",
    "SetAsideData",
    "StepStatus",
    "SweepCandidate",
    "TenantRecord",
    "TrainOn",
    "UsageRecord",
    "VersionRecord",
]
