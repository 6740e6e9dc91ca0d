"""What is counted of generations, by Prometheus' client; `exposition` shows it.

With PROMETHEUS_MULTIPROC_DIR set before the first import of `prometheus_client`, which reads it, each process keeps its
numbers in files of that folder: a killed process loses none, and any gateway shows those of all. Without it they live
in this process.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Tenants that have labels of their own in one process.
MAX_TENANT_LABELS = 200
#: Adapters that do.
MAX_ADAPTER_LABELS = 500

#: The label of all further ones; no tenant or adapter can be named so.
OTHER_LABEL = "(other)"
#: The tenant's label where an admin asks for itself.
ADMIN_LABEL = "(admin)"

#: Where the numbers of a node's processes are; None: in this process alone.
MULTIPROC_DIR = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]) if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
if MULTIPROC_DIR is not None:
    MULTIPROC_DIR.mkdir(parents=True, exist_ok=True)  # the first to come; the client itself doesn't make it

#: All of loramill's metrics that this process knows.
REGISTRY = CollectorRegistry()

_ADAPTER_LABELS = ("tenant", "adapter")

HTTP_REQUESTS = Counter(
    "loramill_http_requests",
    "Requests to the gateway, by the path of their endpoint; those that reached none are (none).",
    ("endpoint", "code"),
    registry=REGISTRY,
)
REQUESTS = Counter(
    "loramill_requests",
    "Generations that have ended; 499 where the caller went away. The base alone is labelled by its name.",
    ("endpoint", *_ADAPTER_LABELS, "code"),
    registry=REGISTRY,
)
REFUSED = Counter(
    "loramill_refused_requests",
    "Generations that were refused, by the error's code: a limit of the tenant's, overload, no replica.",
    ("tenant", "reason"),
    registry=REGISTRY,
)
IN_FLIGHT = Gauge(
    "loramill_requests_in_flight",
    "Generations that the gateways have begun to read and not ended.",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
PROMPT_TOKENS = Counter(
    "loramill_prompt_tokens",
    "Tokens of prompts; several answers to one count it once.",
    _ADAPTER_LABELS,
    registry=REGISTRY,
)
COMPLETION_TOKENS = Counter("loramill_completion_tokens", "Tokens of answers.", _ADAPTER_LABELS, registry=REGISTRY)
FIRST_TOKEN = Histogram(
    "loramill_time_to_first_token_seconds",
    "From the admission of a request to the first chunk of an answer.",
    _ADAPTER_LABELS,
    registry=REGISTRY,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
BETWEEN_TOKENS = Histogram(
    "loramill_time_between_tokens_seconds",
    "From one chunk of an answer to the next, divided by the tokens that it brought.",
    ("tenant",),
    registry=REGISTRY,
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
DURATION = Histogram(
    "loramill_request_duration_seconds",
    "From the admission of a request to the end of its last answer, of those that were answered.",
    ("tenant",),
    registry=REGISTRY,
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)


class BoundedLabels:
    """Names as labels: the first that come keep theirs, all further ones share one, so that series stay few."""

    def __init__(self, max_labels: int) -> None:
        self._max_labels = max_labels
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """The label of a name; the same for ever."""
        if name not in self._known:
            if len(self._known) >= self._max_labels:
                return OTHER_LABEL
            self._known.add(name)
        return name
