"""What an engine is put under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from loramill.errors import EngineFault
from loramill.serve.engine import Engine, EngineConfig, Output, Request
from loramill_bench.engine.subject import Subject

_PATIENCE = 60.0  # seconds without anything to do until requests count as lost


class Load:
    """Requests on an engine, from submit to last output.

    Attributes:
        open: of them, those that have not ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.open = 0
        self._engine = engine

    def submit(self, requests: Sequence[Request]) -> None:
        """Hands them to the engine."""
        for request in requests:
            self._engine.submit(request)
        self.open += len(requests)

    def step(self) -> list[Output]:
        """One step, once there is something to do.

        Raises:
            LoramillError: a request's own, or EngineFault: the engine does nothing though requests are open.
        """
        if not self._engine.wait(_PATIENCE):
            raise EngineFault(f"{self.open} requests are open and the engine has done nothing for {_PATIENCE:g} s.")
        outputs = self._engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        self.open -= sum(output.finish_reason is not None for output in outputs)
        return outputs

    def run(self, requests: Sequence[Request] = ()) -> None:
        """Submits these and steps until none is open."""
        self.submit(requests)
        while self.open:
            self.step()

    def begin(self, requests: Sequence[Request]) -> None:
        """Submits these and steps until each has had a token."""
        self.submit(requests)
        silent = {request.id for request in requests}
        while silent:
            silent -= {output.request_id for output in self.step() if output.tokens}


@contextmanager
def decoding(
    subject: Subject,
    versions: Sequence[str | None],
    context: int,
    steps: int,
    resident: Sequence[str] = (),
    **limits: Any,
) -> Iterator[Engine]:
    """An engine whose next `steps` steps decode a sequence a version, each from `context` tokens on.

    Args:
        subject: its base and adapters.
        versions: of the sequences.
        context: tokens of a prompt.
        steps: that will be taken.
        resident: versions that are loaded, too, but not used.
        limits: further ones of the engine.
    """
    batch, margin = len(versions), 32
    sizes: dict[str, Any] = {
        "max_sequences": batch,
        "max_batch_tokens": max(512, batch * context),  # all prompts in one step: the sequences stay in step
        "kv_tokens": batch * (context + steps + margin),
    }
    with subject.engine(EngineConfig(**{**sizes, **limits})) as engine:
        load = Load(engine)
        load.run(subject.requests(sorted({*resident, *filter(None, versions)}), 1, 1))
        load.begin(subject.requests(versions, context, steps + margin))
        yield engine
