"""What a replica says of its load: to the routers in each report, and to the autoscaling."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import Any

from loramill.serve.autoscaling.policy import ReplicaLoad
from loramill.serve.engine import EngineStats
from loramill.serve.routing.policy import report_stats

#: Seconds that count as lately.
WINDOW_SECONDS = 10.0


class LoadWindow:
    """Turns looks at an engine into what is reported of it. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._first_tokens: deque[tuple[float, float]] = deque()
        self._computed: deque[tuple[float, int]] = deque()

    def record_first_token(self, now: float, seconds: float) -> None:
        """An answer's first token has come, so long after it was asked for."""
        self._first_tokens.append((now, seconds))

    def load(self, now: float, stats: EngineStats) -> ReplicaLoad:
        """For the autoscaling; called again and again, since speed is the difference of two looks."""
        self._computed.append((now, stats.computed_tokens))
        for series in (self._first_tokens, self._computed):
            while len(series) > 1 and series[0][0] < now - WINDOW_SECONDS:
                series.popleft()
        (since, before), seconds = (
            self._computed[0],
            [took for at, took in self._first_tokens if at >= now - WINDOW_SECONDS],
        )
        return ReplicaLoad(
            pending_tokens=stats.pending_tokens,
            tokens_per_second=(stats.computed_tokens - before) / (now - since) if now > since else 0.0,
            first_token_seconds=sum(seconds) / len(seconds) if seconds else 0.0,
            running=stats.running,
            waiting=stats.waiting,
        )

    def autoscaling_stats(self, now: float, stats: EngineStats) -> dict[str, float]:
        """The load as Serve takes it from `record_autoscaling_stats`."""
        return {name: float(value) for name, value in asdict(self.load(now, stats)).items()}

    def routing_stats(self, stats: EngineStats) -> dict[str, Any]:
        """Adapters and requests as Serve takes them from `record_routing_stats`."""
        return report_stats(
            (*stats.resident, *stats.loading), slots=stats.slots, requests=stats.running + stats.waiting
        )
