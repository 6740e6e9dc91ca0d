"""Promotions while requests are running."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle

import httpx

from loramill_bench.http.answers import Run, check_complete, p99_gap
from loramill_bench.http.rounds import Streams, median_of, run_in_turns
from loramill_bench.http.testbed import Testbed
from loramill_bench.http.workload import DISTINCT
from loramill_bench.results import Result

_STREAMS, _REQUESTS_PER_STREAM = 32, 6
#: Seconds between two promotions, and the limit of the gaps between tokens relative to those without promotions.
_INTERVAL_SECONDS, _MAX_GAP_GROWTH = 0.25, 1.2


def measure(testbed: Testbed, rounds: int) -> list[Result]:
    """Compares the gaps between tokens of 32 streams over 8 adapters with and without promotions.

    Each adapter has two versions, which are promoted alternately. No request may fail.

    Raises:
        httpx.HTTPStatusError: The server refused a promotion.
    """
    promoted, moves = 0, _promotions(testbed)

    def streams_of_round(number: int) -> Streams:
        return testbed.workload.closed_loop(
            "distinct", _STREAMS, _REQUESTS_PER_STREAM if number else 1, f"promotion {number}"
        )

    def promoting(streams: Streams) -> Run:
        nonlocal promoted
        with _client(testbed) as http:
            run = testbed.start_streams(testbed.loramill, streams)
            while not run.done():
                adapter, version = next(moves)
                http.post(f"/v1/adapters/{adapter}/promote", json={"version": version}).raise_for_status()
                promoted += 1
                time.sleep(_INTERVAL_SECONDS)
        return run.result()

    runs = run_in_turns(
        {"calm": partial(testbed.run_streams, testbed.loramill), "promoting": promoting}, streams_of_round, rounds
    )
    check_complete("loramill", runs["calm"])
    calm = median_of(runs["calm"], p99_gap)
    answers = [answer for run in runs["promoting"] for answer in run.answers]
    failed = sum(bool(answer.fault or answer.refused) for answer in answers)
    return [
        Result("promote 32: errors", failed, f"of {len(answers)} requests", 0),
        Result(
            "promote 32: p99 gap",
            median_of(runs["promoting"], p99_gap) / calm,
            "of the gap without promotions",
            _MAX_GAP_GROWTH,
        ),
        Result("promote 32: p99 gap without promotions", 1e3 * calm, "ms"),
        Result("promote 32: promotions", promoted, "in all", better="higher"),
    ]


def _client(testbed: Testbed) -> httpx.Client:
    headers = {"authorization": f"Bearer {testbed.loramill.key}"}
    return httpx.Client(base_url=testbed.loramill.url, headers=headers, trust_env=False)


def _promotions(testbed: Testbed) -> Iterator[tuple[str, str]]:
    """Adapters and versions to promote: every adapter's second version, then every adapter's first, and so on."""
    adapters = list(testbed.published.versions.items())[:DISTINCT]
    return ((name, versions[index]) for index in cycle((1, 0)) for name, versions in adapters)
