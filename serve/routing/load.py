"""The load of a replica, as it is reported to the routers and to the autoscaling policy."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import Any

from loramill.serve.autoscaling.policy import ReplicaLoad
from loramill.serve.engine import EngineStats
from loramill.serve.routing.policy import report_stats

#: Seconds over which the load is averaged.
WINDOW_SECONDS = 10.0


class LoadWindow:
    """Averages an engine's statistics over the last `WINDOW_SECONDS`. Times are seconds of any one clock.

    Args:
        expected_tokens_per_second: speed of the engine under full load, until it is measured; 0: unknown.
    """

    def __init__(self, expected_tokens_per_second: float = 0.0) -> None:
        self._expected_tokens_per_second = expected_tokens_per_second
        self._first_tokens: deque[tuple[float, float]] = deque()
        self._computed: deque[tuple[float, int]] = deque()

    def record_first_token(self, now: float, seconds: float) -> None:
        """Records an answer's time to first token."""
        self._first_tokens.append((now, seconds))

    def load(self, now: float, stats: EngineStats) -> ReplicaLoad:
        """The load for the autoscaling policy; call it periodically: speed is the difference of two calls."""
        self._computed.append((now, stats.computed_tokens))
        for series in (self._first_tokens, self._computed):
            while len(series) > 1 and series[0][0] < now - WINDOW_SECONDS:
                series.popleft()
        (since, before), seconds = (
            self._computed[0],
            [seconds_to_first for at, seconds_to_first in self._first_tokens if at >= now - WINDOW_SECONDS],
        )
        return ReplicaLoad(
            pending_tokens=stats.pending_tokens,
            tokens_per_second=(stats.computed_tokens - before) / (now - since) if now > since else 0.0,
            first_token_seconds=sum(seconds) / len(seconds) if seconds else 0.0,
            running=stats.running,
            waiting=stats.waiting,
            expected_tokens_per_second=self._expected_tokens_per_second,
        )

    def autoscaling_stats(self, now: float, stats: EngineStats) -> dict[str, float]:
        """The load, as Serve expects it from `record_autoscaling_stats`."""
        return {name: float(value) for name, value in asdict(self.load(now, stats)).items()}

    def routing_stats(self, stats: EngineStats) -> dict[str, Any]:
        """Adapters and requests, as Serve expects them from `record_routing_stats`."""
        return report_stats(
            (*stats.resident, *stats.loading), slots=stats.slots, requests=stats.running + stats.waiting
        )
