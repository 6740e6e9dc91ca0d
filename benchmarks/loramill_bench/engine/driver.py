"""Drives an engine: submits requests and steps until they are answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from loramill.errors import EngineFault
from loramill.serve.engine import Engine, EngineConfig, Output, Request
from loramill_bench.engine.harness import Harness

_TIMEOUT_SECONDS = 60.0  # seconds without anything to do until requests count as lost


class EngineDriver:
    """Submits requests to an engine and steps it.

    Attributes:
        open: Number of requests that have not ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.open = 0
        self._engine = engine

    def submit(self, requests: Sequence[Request]) -> None:
        """Submits requests."""
        for request in requests:
            self._engine.submit(request)
        self.open += len(requests)

    def step(self) -> list[Output]:
        """Waits until the engine has work, and takes one step.

        Raises:
            LoramillError: The error of a request.
            EngineFault: The engine has no work although requests are open.
        """
        if not self._engine.wait(_TIMEOUT_SECONDS):
            raise EngineFault(
                f"{self.open} requests are open and the engine has done nothing for {_TIMEOUT_SECONDS:g} s."
            )
        outputs = self._engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        self.open -= sum(output.finish_reason is not None for output in outputs)
        return outputs

    def run(self, requests: Sequence[Request] = ()) -> None:
        """Submits requests and steps until all have ended."""
        self.submit(requests)
        while self.open:
            self.step()

    def run_to_first_tokens(self, requests: Sequence[Request]) -> None:
        """Submits requests and steps until each has a token."""
        self.submit(requests)
        without_tokens = {request.id for request in requests}
        while without_tokens:
            without_tokens -= {output.request_id for output in self.step() if output.tokens}


@contextmanager
def decoding_engine(
    harness: Harness,
    versions: Sequence[str | None],
    context: int,
    steps: int,
    resident: Sequence[str] = (),
    **limits: Any,
) -> Iterator[Engine]:
    """An engine whose next `steps` steps decode one sequence per version, starting at `context` tokens.

    Args:
        harness: The base and adapters.
        versions: Version of each sequence.
        context: Number of tokens of each prompt.
        steps: Number of steps that will be taken.
        resident: Versions that are also loaded, but not used.
        limits: Further fields of EngineConfig.
    """
    batch, margin = len(versions), 32
    sizes: dict[str, Any] = {
        "max_sequences": batch,
        "max_batch_tokens": max(512, batch * context),  # all prompts in one step: the sequences stay in step
        "kv_tokens": batch * (context + steps + margin),
    }
    with harness.engine(EngineConfig(**{**sizes, **limits})) as engine:
        driver = EngineDriver(engine)
        driver.run(harness.requests(sorted({*resident, *filter(None, versions)}), 1, 1))
        driver.run_to_first_tokens(harness.requests(versions, context, steps + margin))
        yield engine
