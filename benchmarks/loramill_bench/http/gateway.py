"""Latency and throughput cost of gateway, router and Serve handle, compared with the engine called directly."""

from __future__ import annotations

from functools import partial

from loramill_bench.http import direct
from loramill_bench.http.answers import Run, check_complete, median_first_token, output_rate
from loramill_bench.http.rounds import Streams, median_of, run_in_turns
from loramill_bench.http.testbed import Testbed
from loramill_bench.results import Result

#: Limits: seconds added to the time to first token, and the fraction of the output throughput that is lost.
_FIRST_TOKEN_SECONDS, _THROUGHPUT_LOSS = 10e-3, 0.03
_FIRST_TOKEN_REQUESTS, _STREAMS, _REQUESTS_PER_STREAM = 32, 32, 4


def measure_first_token(testbed: Testbed, rounds: int) -> list[Result]:
    """Compares the client's time to first token of one stream over HTTP and of the engine called directly.

    The engine takes and returns token ids in the calling thread. The difference therefore includes, in addition to
    gateway, router and handle, HTTP on both sides, the tokenizer, and all switches between threads and processes.
    """

    def streams_of_round(number: int) -> Streams:
        return testbed.workload.closed_loop(
            "distinct", 1, _FIRST_TOKEN_REQUESTS if number else 4, f"first token {number}"
        )

    runs = run_in_turns(
        {
            "loramill": partial(testbed.run_streams, testbed.loramill),
            "engine": partial(testbed.run_direct, direct.run_engine),
        },
        streams_of_round,
        rounds,
    )
    for server, server_runs in runs.items():
        check_complete(server, server_runs)
    ours, engine = median_of(runs["loramill"], median_first_token), median_of(runs["engine"], median_first_token)
    return [
        Result("gateway first token: added", 1e3 * (ours - engine), "ms", 1e3 * _FIRST_TOKEN_SECONDS),
        Result("gateway first token: over HTTP", 1e3 * ours, "ms"),
        Result("gateway first token: engine called directly", 1e3 * engine, "ms"),
    ]


def measure_throughput(testbed: Testbed, rounds: int) -> list[Result]:
    """Compares the output throughput of 32 streams over HTTP and of an engine replica called directly.

    The HTTP client uses CPU time of the same cores. To correct for that, the throughput over HTTP is divided by the
    fraction of CPU time that the client left to the server.
    """

    def streams_of_round(number: int) -> Streams:
        return testbed.workload.closed_loop(
            "distinct", _STREAMS, _REQUESTS_PER_STREAM if number else 1, f"throughput {number}"
        )

    runs = run_in_turns(
        {
            "loramill": partial(testbed.run_streams, testbed.loramill),
            "replica": partial(testbed.run_direct, direct.run_replica),
        },
        streams_of_round,
        rounds,
    )
    for server, server_runs in runs.items():
        check_complete(server, server_runs)

    def corrected(run: Run) -> float:
        return output_rate(run) / (1 - run.cpu / run.seconds / testbed.cores)

    replica = median_of(runs["replica"], output_rate)
    return [
        Result(
            "gateway 32: throughput lost",
            1 - median_of(runs["loramill"], corrected) / replica,
            "of the replica's",
            _THROUGHPUT_LOSS,
        ),
        Result("gateway 32: output throughput", median_of(runs["loramill"], output_rate), "tokens/s", better="higher"),
        Result("gateway 32: the replica's output throughput", replica, "tokens/s", better="higher"),
        Result(
            "gateway 32: client CPU time", median_of(runs["loramill"], lambda run: run.cpu / run.seconds), "of a core"
        ),
    ]
