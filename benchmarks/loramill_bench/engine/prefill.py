"""How fast a prompt is read."""

from __future__ import annotations

from dataclasses import dataclass

from loramill.pipelines.compare.timing import Effort, interleaved
from loramill.serve.engine import EngineConfig
from loramill_bench.engine.load import Load
from loramill_bench.engine.subject import Subject
from loramill_bench.measure import Result


@dataclass(frozen=True, slots=True)
class Prompt:
    """One of so many tokens, in one step."""

    tokens: int

    @property
    def name(self) -> str:
        """Its tokens."""
        return f"prefill {self.tokens}"


CASES = (Prompt(512),)


def measure(subject: Subject, prompt: Prompt, rounds: int) -> list[Result]:
    """To the first token, without an adapter and with one."""
    with subject.engine(EngineConfig(max_batch_tokens=prompt.tokens)) as engine:
        load = Load(engine)
        spent = interleaved(
            {
                "base": lambda: load.run(subject.requests([None], prompt.tokens, 1)),
                "one adapter": lambda: load.run(subject.requests(["0"], prompt.tokens, 1)),
            },
            Effort(0, rounds),
        )
    return [
        Result(f"{prompt.name}: {how}", prompt.tokens / seconds, "tokens/s", better="higher")
        for how, seconds in spent.items()
    ]
