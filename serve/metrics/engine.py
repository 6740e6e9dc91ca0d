"""Metrics of an engine replica, taken from its statistics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from loramill.serve.engine import EngineStats
from loramill.serve.engine.durations import BOUNDS_SECONDS
from loramill.serve.metrics.definitions import REGISTRY
from loramill.serve.metrics.prometheus_private import PrecountedHistogram

#: Current levels.
_GAUGES = {
    name: Gauge(f"loramill_{name}", text, ("replica",), registry=REGISTRY, multiprocess_mode="livesum")
    for name, text in {
        "engine_running": "Answers in the batch.",
        "engine_waiting": "Answers that do not run yet, or were preempted.",
        "kv_blocks": "Blocks of the KV cache.",
        "kv_blocks_used": "Blocks of the KV cache in use by answers.",
        "adapter_slots": "Adapters that can be resident at once.",
        "adapter_slots_used": "Adapters that are resident or being loaded.",
        "adapter_bytes": "Bytes of the resident adapters.",
        "adapter_host_bytes": "Bytes of the host-memory cache of adapters.",
    }.items()
}

#: Totals, by their names in EngineStats.
_COUNTERS = {
    field: Counter(f"loramill_{name}", text, ("replica",), registry=REGISTRY)
    for field, name, text in (
        ("steps", "engine_steps", "Steps that ran the model."),
        ("computed_tokens", "engine_computed_tokens", "Tokens that passed the decoder, of prompts and answers."),
        ("generated_tokens", "engine_generated_tokens", "Tokens of answers."),
        ("reused_tokens", "prefix_cache_reused_tokens", "Tokens that the prefix cache saved from being computed."),
        ("preemptions", "engine_preemptions", "Preemptions: answers that lost their KV blocks and are computed again."),
        ("loads", "adapter_loads", "Adapters that were loaded into a slot."),
        ("load_failures", "adapter_load_failures", "Adapters that failed to load."),
        ("evictions", "adapter_evictions", "Adapters that lost their slot to another."),
        (
            "failed_captures",
            "graph_capture_failures",
            "Sizes of decode steps without a CUDA graph: its capture failed.",
        ),
    )
}

#: Durations, by their names in EngineStats.
_HISTOGRAMS = {
    field: PrecountedHistogram(
        f"loramill_{name}_seconds", text, ("replica",), registry=REGISTRY, buckets=BOUNDS_SECONDS
    )
    for field, name, text in (
        ("queue_times", "engine_queue", "From the submission of an answer until it first ran."),
        ("step_times", "engine_step", "One step of the model for all running answers."),
        ("load_times", "adapter_load", "From the allocation of an adapter's slot until the adapter was ready."),
    )
}


class EngineMetrics:
    """Exports the statistics of one replica's engine.

    Args:
        replica: value of the label; unique to each engine that ever ran.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._previous = EngineStats()

    def update(self, stats: EngineStats) -> None:
        """Exports new statistics; called by one thread, at the interval at which metrics should change."""
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
        for name, histogram in _HISTOGRAMS.items():
            now, before = getattr(stats, name), getattr(self._previous, name)
            counts = [count - past for count, past in zip(now.counts, before.counts, strict=True)]
            histogram.labels(self._replica).add_counts(counts, now.total_seconds - before.total_seconds)
        self._previous = stats
