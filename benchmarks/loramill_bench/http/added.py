"""What gateway, router and handle add to an engine replica."""

from __future__ import annotations

from functools import partial

from loramill_bench.http import bare
from loramill_bench.http.answers import Run, check_complete, first_token, rate
from loramill_bench.http.site import Site
from loramill_bench.http.turns import Streams, alternated, typical
from loramill_bench.measure import Result

#: Seconds to the first token, and the part of the output tokens a second.
_FIRST_TOKEN, _THROUGHPUT = 10e-3, 0.03
_ASKS, _STREAMS, _EACH = 32, 32, 4


def to_first_token(site: Site, rounds: int) -> list[Result]:
    """One stream over HTTP, in turn with the same requests to the engine itself, by the clock of who asks.

    The engine gets tokens and gives tokens in the thread that asks, so what is told apart holds besides gateway, router
    and handle the HTTP on both sides, the tokenizer and all changes of threads and processes: more than is bounded.
    """

    def draw(number: int) -> Streams:
        return site.desk.closed("distinct", 1, _ASKS if number else 4, f"first token {number}")

    runs = alternated(
        {"loramill": partial(site.ask, site.loramill), "engine": partial(site.bare, bare.engine)}, draw, rounds
    )
    for who, its in runs.items():
        check_complete(who, its)
    ours, least = typical(runs["loramill"], first_token), typical(runs["engine"], first_token)
    return [
        Result("gateway first token: added", 1e3 * (ours - least), "ms", 1e3 * _FIRST_TOKEN),
        Result("gateway first token: over HTTP", 1e3 * ours, "ms"),
        Result("gateway first token: of the engine", 1e3 * least, "ms"),
    ]


def to_throughput(site: Site, rounds: int) -> list[Result]:
    """32 streams over HTTP, in turn with the same requests to a replica in a process of its own, from text to text.

    Who asks over HTTP takes time from the same cores, which is no fault of the gateway: the replica is taken to be as
    much slower as the cores had less left for the server.
    """

    def draw(number: int) -> Streams:
        return site.desk.closed("distinct", _STREAMS, _EACH if number else 1, f"throughput {number}")

    runs = alternated(
        {"loramill": partial(site.ask, site.loramill), "replica": partial(site.bare, bare.offline)}, draw, rounds
    )
    for who, its in runs.items():
        check_complete(who, its)

    def corrected(run: Run) -> float:
        return rate(run) / (1 - run.cpu / run.seconds / site.cores)

    replica = typical(runs["replica"], rate)
    return [
        Result("gateway 32: lost", 1 - typical(runs["loramill"], corrected) / replica, "of the replica's", _THROUGHPUT),
        Result("gateway 32: answers", typical(runs["loramill"], rate), "tokens/s", better="higher"),
        Result("gateway 32: the replica's answers", replica, "tokens/s", better="higher"),
        Result("gateway 32: who asks", typical(runs["loramill"], lambda run: run.cpu / run.seconds), "of a core"),
    ]
