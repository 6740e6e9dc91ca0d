"""The cost of loaded adapters that no request uses."""

from __future__ import annotations

from dataclasses import dataclass

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill_bench.engine.driver import decoding_engine
from loramill_bench.engine.harness import Harness
from loramill_bench.results import Result

_CONTEXT = 64
_RESIDENT = 8


@dataclass(frozen=True, slots=True)
class IdleAdapters:
    """Decode steps of a batch of sequences without an adapter."""

    batch: int

    @property
    def name(self) -> str:
        """Name with the number of sequences."""
        return f"idle adapters {self.batch}"


CASES = (IdleAdapters(1), IdleAdapters(32))


def measure(harness: Harness, case: IdleAdapters, rounds: int) -> list[Result]:
    """Compares the default slots, some of them loaded, with the smallest slab that a configuration allows."""
    step_rounds = 4 * rounds
    no_adapters = [None] * case.batch
    resident = [str(number) for number in range(_RESIDENT)]
    with (
        decoding_engine(harness, no_adapters, _CONTEXT, step_rounds, adapter_slots=1, adapter_bytes=1) as bare,
        decoding_engine(harness, no_adapters, _CONTEXT, step_rounds, resident) as enabled,
    ):
        spent = interleaved({"bare": bare.step, "enabled": enabled.step}, Effort(0, step_rounds))
    return [
        Result(f"{case.name}: added", spent["enabled"] / spent["bare"] - 1, "of step", 0.01),
        Result(f"{case.name}: decode", case.batch / spent["enabled"], "tokens/s", better="higher"),
    ]
