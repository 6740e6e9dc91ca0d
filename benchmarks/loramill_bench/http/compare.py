"""Output tokens a second over HTTP, against vLLM's and against the bare engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loramill_bench.http import bare
from loramill_bench.http.answers import Run, check_complete, first_token, rate
from loramill_bench.http.site import Site
from loramill_bench.http.turns import Streams, alternated, typical
from loramill_bench.http.work import Mix
from loramill_bench.measure import Result

#: What HTTP, gateway, router and text may leave of the bare engine's.
_OF_ENGINE = 0.9


@dataclass(frozen=True, slots=True)
class Crowd:
    """So many streams over a mix of adapters.

    Attributes:
        over_vllm: how many times as fast as vLLM loramill must be; None, as for one stream: it is only told.
        each: requests of a stream.
    """

    mix: Mix
    streams: int
    over_vllm: float | None = None
    each: int = 4

    @property
    def name(self) -> str:
        """The mix and the streams."""
        return f"http {self.mix} {self.streams}"


CASES = (
    Crowd("none", 1),
    Crowd("none", 8, 1.2),
    Crowd("none", 32, 1.2),
    Crowd("distinct", 1),
    Crowd("distinct", 8, 4.0),
    Crowd("distinct", 32, 4.0),
    Crowd("zipf", 8, 4.0),
    Crowd("zipf", 32, 4.0),
)


def measure(site: Site, crowd: Crowd, rounds: int) -> list[Result]:
    """All in turn: loramill's server, the engine alone and, if there is one, vLLM's server.

    Without adapters vLLM runs with LoRA off, else with a slot for each of 8 adapters.
    """

    def draw(number: int) -> Streams:
        return site.desk.closed(crowd.mix, crowd.streams, crowd.each if number else 1, number)

    variants: dict[str, Callable[[Streams], Run]] = {
        "loramill": partial(site.ask, site.loramill),
        "engine": partial(site.bare, bare.engine),
    }
    if site.vllm is not None:
        variants["vLLM"] = partial(site.ask, site.vllm_base if crowd.mix == "none" else site.vllm_adapters)
    runs = alternated(variants, draw, rounds)
    for who, theirs in runs.items():
        check_complete(who, theirs)
    ours, name = typical(runs["loramill"], rate), crowd.name
    share = ours / typical(runs["engine"], rate)
    results = [
        Result(f"{name}: answers", ours, "tokens/s", better="higher"),
        Result(f"{name}: first token", 1e3 * typical(runs["loramill"], first_token), "ms"),
        Result(f"{name}: of the engine", share, "x", None if crowd.over_vllm is None else _OF_ENGINE, "higher"),
    ]
    if site.vllm is None:
        return results
    vllm = typical(runs["vLLM"], rate)
    return [
        Result(f"{name}: over vLLM", ours / vllm, "x", crowd.over_vllm, "higher"),
        *results,
        Result(f"{name}: vLLM's answers", vllm, "tokens/s", better="higher"),
        Result(f"{name}: vLLM's first token", 1e3 * typical(runs["vLLM"], first_token), "ms"),
    ]
