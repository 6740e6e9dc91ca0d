"""Serving under three times as many requests as the server's capacity."""

from __future__ import annotations

from loramill_bench.http.answers import check_complete, output_rate, p95_latency
from loramill_bench.http.testbed import Testbed
from loramill_bench.results import Result

#: Offered load relative to the capacity, its duration, and the limit of the latency relative to that at capacity.
_OFFERED_LOAD, _SECONDS, _MAX_LATENCY_GROWTH = 3.0, 20.0, 2.0
_REQUESTS_PER_STREAM = 4


def measure(testbed: Testbed, rounds: int) -> list[Result]:
    """Sends requests at random times (Poisson) at three times the capacity, with a Zipf distribution over 64 adapters.

    The capacity and the latency at capacity are those of as many concurrent streams as the engine runs sequences. Every
    request must get a complete answer, or a 429 with Retry-After; anything else is an error. `rounds` is ignored.
    """
    streams = testbed.serve.max_sequences
    testbed.run_streams(testbed.loramill, testbed.workload.closed_loop("zipf", streams, 1, "overload, to warm up"))
    capacity = testbed.run_streams(
        testbed.loramill, testbed.workload.closed_loop("zipf", streams, _REQUESTS_PER_STREAM, "capacity")
    )
    check_complete("loramill", [capacity])
    offered_rate = _OFFERED_LOAD * len(capacity.answers) / capacity.seconds
    overloaded = testbed.run_streams(
        testbed.loramill, testbed.workload.poisson("zipf", offered_rate, _SECONDS, "overload")
    )
    return [
        Result(
            "overload: p95 latency",
            p95_latency(overloaded) / p95_latency(capacity),
            "of that at capacity",
            _MAX_LATENCY_GROWTH,
        ),
        Result("overload: errors", len(overloaded.faults), f"of {len(overloaded.answers)} requests", 0),
        Result(
            "overload: accepted", len(overloaded.served) / len(overloaded.answers), "of the requests", better="higher"
        ),
        Result("overload: output throughput", output_rate(overloaded), "tokens/s", better="higher"),
        Result("overload: output throughput at capacity", output_rate(capacity), "tokens/s", better="higher"),
        Result("overload: p95 latency at capacity", p95_latency(capacity), "s"),
    ]
