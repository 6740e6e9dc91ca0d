"""New champions while many are being answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle

import httpx

from loramill_bench.http.answers import Run, check_complete, gap
from loramill_bench.http.site import Site
from loramill_bench.http.turns import Streams, alternated, typical
from loramill_bench.http.work import DISTINCT
from loramill_bench.measure import Result

_STREAMS, _EACH = 32, 6
#: Seconds between two promotions, and what the gaps between tokens may grow to.
_EVERY, _GAP = 0.25, 1.2


def measure(site: Site, rounds: int) -> list[Result]:
    """32 streams over 8 adapters, in turn with the same while one adapter after another gets another champion.

    Each has two versions that take turns. Nothing may go wrong, and the tokens must come about as steadily.

    Raises:
        httpx.HTTPStatusError: the server refused to promote.
    """
    promoted, moves = 0, _moves(site)

    def draw(number: int) -> Streams:
        return site.desk.closed("distinct", _STREAMS, _EACH if number else 1, f"promotion {number}")

    def promoting(streams: Streams) -> Run:
        nonlocal promoted
        with _client(site) as http:
            run = site.begin(site.loramill, streams)
            while not run.done():
                adapter, version = next(moves)
                http.post(f"/v1/adapters/{adapter}/promote", json={"version": version}).raise_for_status()
                promoted += 1
                time.sleep(_EVERY)
        return run.result()

    runs = alternated({"calm": partial(site.ask, site.loramill), "promoting": promoting}, draw, rounds)
    check_complete("loramill", runs["calm"])
    calm = typical(runs["calm"], gap)
    answers = [answer for run in runs["promoting"] for answer in run.answers]
    failed = sum(bool(answer.fault or answer.refused) for answer in answers)
    return [
        Result("promote 32: errors", failed, f"of {len(answers)} requests", 0),
        Result("promote 32: p99 gap", typical(runs["promoting"], gap) / calm, "of when nothing is promoted", _GAP),
        Result("promote 32: p99 gap when nothing is", 1e3 * calm, "ms"),
        Result("promote 32: promotions", promoted, "in all", better="higher"),
    ]


def _client(site: Site) -> httpx.Client:
    headers = {"authorization": f"Bearer {site.loramill.key}"}
    return httpx.Client(base_url=site.loramill.url, headers=headers, trust_env=False)


def _moves(site: Site) -> Iterator[tuple[str, str]]:
    """Every adapter's second version, then every one's first, and so on."""
    adapters = list(site.published.versions.items())[:DISTINCT]
    return ((name, versions[place]) for place in cycle((1, 0)) for name, versions in adapters)
