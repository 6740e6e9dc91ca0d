"""Output throughput over HTTP, compared with vLLM and with the engine called directly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loramill_bench.http import direct
from loramill_bench.http.answers import Run, check_complete, median_first_token, output_rate
from loramill_bench.http.rounds import Streams, median_of, run_in_turns
from loramill_bench.http.testbed import Testbed
from loramill_bench.http.workload import Mix
from loramill_bench.results import Result

#: Minimum fraction of the engine's throughput that must remain over HTTP, gateway, router and tokenizer.
_SHARE_OF_ENGINE = 0.9


@dataclass(frozen=True, slots=True)
class HttpCase:
    """A number of concurrent streams over a mix of adapters.

    Attributes:
        mix: Which adapters the streams use.
        streams: Number of streams.
        over_vllm: Target of the throughput relative to vLLM's; None: no target.
        requests_per_stream: Number of requests per stream.
    """

    mix: Mix
    streams: int
    over_vllm: float | None = None
    requests_per_stream: int = 4

    @property
    def name(self) -> str:
        """Mix and number of streams."""
        return f"http {self.mix} {self.streams}"


CASES = (
    HttpCase("none", 1),
    HttpCase("none", 8, 1.2),
    HttpCase("none", 32, 1.2),
    HttpCase("distinct", 1),
    HttpCase("distinct", 8, 4.0),
    HttpCase("distinct", 32, 4.0),
    HttpCase("zipf", 8, 4.0),
    HttpCase("zipf", 32, 4.0),
)


def measure(testbed: Testbed, case: HttpCase, rounds: int) -> list[Result]:
    """Measures loramill's server, the engine called directly and, if available, vLLM's server in turns.

    Without adapters, vLLM runs with LoRA disabled, otherwise with 8 adapter slots.
    """

    def streams_of_round(number: int) -> Streams:
        return testbed.workload.closed_loop(case.mix, case.streams, case.requests_per_stream if number else 1, number)

    variants: dict[str, Callable[[Streams], Run]] = {
        "loramill": partial(testbed.run_streams, testbed.loramill),
        "engine": partial(testbed.run_direct, direct.run_engine),
    }
    if testbed.vllm is not None:
        variants["vLLM"] = partial(
            testbed.run_streams, testbed.vllm_base if case.mix == "none" else testbed.vllm_adapters
        )
    runs = run_in_turns(variants, streams_of_round, rounds)
    for server, server_runs in runs.items():
        check_complete(server, server_runs)
    ours, name = median_of(runs["loramill"], output_rate), case.name
    share = ours / median_of(runs["engine"], output_rate)
    results = [
        Result(f"{name}: output throughput", ours, "tokens/s", better="higher"),
        Result(f"{name}: first token", 1e3 * median_of(runs["loramill"], median_first_token), "ms"),
        Result(f"{name}: over the engine", share, "x", None if case.over_vllm is None else _SHARE_OF_ENGINE, "higher"),
    ]
    if testbed.vllm is None:
        return results
    vllm = median_of(runs["vLLM"], output_rate)
    return [
        Result(f"{name}: over vLLM", ours / vllm, "x", case.over_vllm, "higher"),
        *results,
        Result(f"{name}: vLLM's output throughput", vllm, "tokens/s", better="higher"),
        Result(f"{name}: vLLM's first token", 1e3 * median_of(runs["vLLM"], median_first_token), "ms"),
    ]
