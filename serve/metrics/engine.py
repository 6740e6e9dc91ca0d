"""What is counted of an engine replica, from looks at its engine."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram

from loramill.serve.engine import EngineStats
from loramill.serve.engine.durations import BOUNDS_SECONDS
from loramill.serve.metrics.definitions import REGISTRY


class _PrecountedHistogram(Histogram):
    """A histogram that takes durations which were counted elsewhere, in its own buckets."""

    def add_counts(self, counts: Sequence[int], seconds: float) -> None:
        """So many more in each bucket, and the seconds that they took together."""
        for bucket, more in zip(self._buckets, counts, strict=True):
            bucket.inc(more)
        self._sum.inc(seconds)


#: What is as it is now.
_GAUGES = {
    name: Gauge(f"loramill_{name}", text, ("replica",), registry=REGISTRY, multiprocess_mode="livesum")
    for name, text in {
        "engine_running": "Answers in the batch.",
        "engine_waiting": "Answers that don't run yet, or had to give up their place.",
        "kv_blocks": "Blocks of the KV cache.",
        "kv_blocks_used": "Blocks of the KV cache that answers hold.",
        "adapter_slots": "Adapters that can be resident at once.",
        "adapter_slots_used": "Adapters that are resident or being loaded.",
        "adapter_bytes": "Memory of the resident adapters.",
        "adapter_host_bytes": "Memory of the adapters that were read and may have no slot.",
    }.items()
}

#: What only grows, by its name in EngineStats.
_COUNTERS = {
    field: Counter(f"loramill_{name}", text, ("replica",), registry=REGISTRY)
    for field, name, text in (
        ("steps", "engine_steps", "Steps that ran the model."),
        ("computed_tokens", "engine_computed_tokens", "Rows that passed the decoder, of prompts and answers."),
        ("generated_tokens", "engine_generated_tokens", "Tokens of answers."),
        ("reused_tokens", "prefix_cache_reused_tokens", "Rows that the prefix cache spared."),
        ("preemptions", "engine_preemptions", "Times that an answer gave up its place and was computed anew."),
        ("loads", "adapter_loads", "Adapters that got a slot and were loaded."),
        ("load_failures", "adapter_load_failures", "Adapters that couldn't be loaded."),
        ("evictions", "adapter_evictions", "Adapters that lost their slot to another."),
    )
}

#: How long things took, by their name in EngineStats.
_HISTOGRAMS = {
    field: _PrecountedHistogram(
        f"loramill_{name}_seconds", text, ("replica",), registry=REGISTRY, buckets=BOUNDS_SECONDS
    )
    for field, name, text in (
        ("waits", "engine_queue", "From an answer's submit until it first ran."),
        ("step_times", "engine_step", "One step of the model for all answers that run."),
        ("load_times", "adapter_load", "From when an adapter had a slot until it was ready."),
    )
}


class EngineMetrics:
    """Carries over what a replica's engine counts.

    Args:
        replica: the label; another one for each engine that ever ran.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._previous = EngineStats()

    def update(self, stats: EngineStats) -> None:
        """Takes a look in; called by one thread, about as often as the numbers should be new."""
        levels = {
            "engine_running": stats.running,
            "engine_waiting": stats.waiting,
            "kv_blocks": stats.blocks,
            "kv_blocks_used": stats.blocks - stats.free_blocks,
            "adapter_slots": stats.slots,
            "adapter_slots_used": len(stats.resident) + len(stats.loading),
            "adapter_bytes": stats.adapter_bytes,
            "adapter_host_bytes": stats.host_bytes,
        }
        for name, level in levels.items():
            _GAUGES[name].labels(self._replica).set(level)
        for name, counter in _COUNTERS.items():
            counter.labels(self._replica).inc(getattr(stats, name) - getattr(self._previous, name))
        for name, tally in _HISTOGRAMS.items():
            now, before = getattr(stats, name), getattr(self._previous, name)
            more = [count - past for count, past in zip(now.counts, before.counts, strict=True)]
            tally.labels(self._replica).add_counts(more, now.seconds - before.seconds)
        self._previous = stats
