"""What it costs to be able to serve adapters while nobody uses one."""

from __future__ import annotations

from dataclasses import dataclass

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill_bench.engine.load import decoding
from loramill_bench.engine.subject import Subject
from loramill_bench.measure import Result

_CONTEXT = 64
_RESIDENT = 8


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps of so many sequences without an adapter."""

    batch: int

    @property
    def name(self) -> str:
        """The sequences."""
        return f"idle adapters {self.batch}"


CASES = (Steps(1), Steps(32))


def measure(subject: Subject, steps: Steps, rounds: int) -> list[Result]:
    """The default slots, some of them loaded, against the smallest slab that a configuration allows."""
    many = 4 * rounds
    nobody = [None] * steps.batch
    resident = [str(number) for number in range(_RESIDENT)]
    with (
        decoding(subject, nobody, _CONTEXT, many, adapter_slots=1, adapter_bytes=1) as bare,
        decoding(subject, nobody, _CONTEXT, many, resident) as enabled,
    ):
        spent = interleaved({"bare": bare.step, "enabled": enabled.step}, Effort(0, many))
    return [
        Result(f"{steps.name}: added", spent["enabled"] / spent["bare"] - 1, "of step", 0.01),
        Result(f"{steps.name}: decode", steps.batch / spent["enabled"], "tokens/s", better="higher"),
    ]
