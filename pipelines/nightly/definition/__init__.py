"""The definition of nightly runs: nightly.yaml, its schema and its checks."""

from loramill.pipelines.nightly.definition.fields import expanded
from loramill.pipelines.nightly.definition.load import (
    NO_FILE,
    load_definition,
    parse_definition,
    read_definition,
)
from loramill.pipelines.nightly.definition.promotion import (
    CanaryDefinition,
    EvaluateDefinition,
    GateDefinition,
    JudgeDefinition,
    Metric,
    NotifyDefinition,
    WatchDefinition,
)
from loramill.pipelines.nightly.definition.schema import (
    AdapterDefinition,
    NightlyDefinition,
    OverrideDefinition,
    matches,
)
from loramill.pipelines.nightly.definition.training import (
    BudgetDefinition,
    FeedbackDefinition,
    ReplayDefinition,
    ScheduleDefinition,
    SourceDefinition,
    SplitDefinition,
    TrainDefinition,
)

__all__ = [
    "NO_FILE",
    "AdapterDefinition",
    "BudgetDefinition",
    "CanaryDefinition",
    "EvaluateDefinition",
    "FeedbackDefinition",
    "GateDefinition",
    "JudgeDefinition",
    "Metric",
    "NightlyDefinition",
    "NotifyDefinition",
    "OverrideDefinition",
    "ReplayDefinition",
    "ScheduleDefinition",
    "SourceDefinition",
    "SplitDefinition",
    "TrainDefinition",
    "WatchDefinition",
    "expanded",
    "load_definition",
    "matches",
    "parse_definition",
    "read_definition",
]
