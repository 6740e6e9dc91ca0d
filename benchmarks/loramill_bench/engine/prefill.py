"""The speed of prefill."""

from __future__ import annotations

from dataclasses import dataclass

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill.serve.engine import EngineConfig
from loramill_bench.engine.driver import EngineDriver
from loramill_bench.engine.harness import Harness
from loramill_bench.results import Result


@dataclass(frozen=True, slots=True)
class Prefill:
    """The prefill of one prompt in one step."""

    tokens: int

    @property
    def name(self) -> str:
        """Name with the number of tokens."""
        return f"prefill {self.tokens}"


CASES = (Prefill(512),)


def measure(harness: Harness, case: Prefill, rounds: int) -> list[Result]:
    """Measures the time to first token, without an adapter and with one."""
    with harness.engine(EngineConfig(max_batch_tokens=case.tokens)) as engine:
        driver = EngineDriver(engine)
        spent = interleaved(
            {
                "base": lambda: driver.run(harness.requests([None], case.tokens, 1)),
                "one adapter": lambda: driver.run(harness.requests(["0"], case.tokens, 1)),
            },
            Effort(0, rounds),
        )
    return [
        Result(f"{case.name}: {how}", case.tokens / seconds, "tokens/s", better="higher")
        for how, seconds in spent.items()
    ]
