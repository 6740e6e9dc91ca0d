"""The metrics of HTTP requests and generations, by Prometheus' client.

If PROMETHEUS_MULTIPROC_DIR is set before the first import of `prometheus_client`, each process keeps its metrics in
files of that folder: a killed process loses none, and each gateway exposes those of all. Otherwise they are in this
process.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Maximum number of tenants with a label of their own in one process.
MAX_TENANT_LABELS = 200
#: Maximum number of adapters with a label of their own in one process.
MAX_ADAPTER_LABELS = 500

#: The label of all others; it is not a valid name of a tenant or adapter.
OTHER_LABEL = "(other)"
#: The tenant label of an admin's own requests.
ADMIN_LABEL = "(admin)"

#: Folder with the metrics of all processes of a node; None: the metrics are in this process.
MULTIPROC_DIR = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]) if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
if MULTIPROC_DIR is not None:
    MULTIPROC_DIR.mkdir(parents=True, exist_ok=True)  # the client does not create it

#: All metrics of loramill in this process.
REGISTRY = CollectorRegistry()

_ADAPTER_LABELS = ("tenant", "adapter")

HTTP_REQUESTS = Counter(
    "loramill_http_requests",
    "HTTP requests to the gateway, by the path of the endpoint; (none) if there is no such endpoint.",
    ("endpoint", "code"),
    registry=REGISTRY,
)
REQUESTS = Counter(
    "loramill_requests",
    "Ended generations; code 499 if the client disconnected. The adapter label of the base alone is its name.",
    ("endpoint", *_ADAPTER_LABELS, "code"),
    registry=REGISTRY,
)
REFUSED = Counter(
    "loramill_refused_requests",
    "Refused generations, by error code: a limit of the tenant, overload, no replica.",
    ("tenant", "reason"),
    registry=REGISTRY,
)
IN_FLIGHT = Gauge(
    "loramill_requests_in_flight",
    "Generations in flight at the gateways.",
    registry=REGISTRY,
    multiprocess_mode="livesum",
)
PROMPT_TOKENS = Counter(
    "loramill_prompt_tokens",
    "Tokens of prompts; a prompt with several answers counts once.",
    _ADAPTER_LABELS,
    registry=REGISTRY,
)
COMPLETION_TOKENS = Counter("loramill_completion_tokens", "Tokens of answers.", _ADAPTER_LABELS, registry=REGISTRY)
FIRST_TOKEN = Histogram(
    "loramill_time_to_first_token_seconds",
    "Time from the admission of a request to the first chunk of an answer.",
    _ADAPTER_LABELS,
    registry=REGISTRY,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
BETWEEN_TOKENS = Histogram(
    "loramill_time_between_tokens_seconds",
    "Time from one chunk of an answer to the next, divided by the tokens of the latter.",
    ("tenant",),
    registry=REGISTRY,
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
DURATION = Histogram(
    "loramill_request_duration_seconds",
    "Time from the admission of an answered request to the end of its last answer.",
    ("tenant",),
    registry=REGISTRY,
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)

DROPPED_COMPLETIONS = Counter(
    "loramill_dropped_completions",
    "Completions with `store: true` that were answered but not stored: the database was unavailable for too long.",
    registry=REGISTRY,
)


class BoundedLabels:
    """Labels for names: the first `max_labels` names have their own, all others share one, which bounds the series."""

    def __init__(self, max_labels: int) -> None:
        self._max_labels = max_labels
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """The label of a name; it never changes."""
        if name not in self._known:
            if len(self._known) >= self._max_labels:
                return OTHER_LABEL
            self._known.add(name)
        return name
