"""An engine over a random base, the requests sent to it, and the durations of its steps."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loramill.errors import LoramillError
from loramill.serve.engine import Engine, EngineConfig, Request, SamplingParams
from loramill.serve.model import Decoder, Model
from loramill_bench.engine.harness import weights_file, write_adapters
from loramill_bench.gpu.bases import served
from loramill_bench.gpu.stage import Context

#: Number of adapters on disk; versions share them.
_FOLDERS = 4
#: The version of an adapter with a NaN.
BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine did until no request was left.

    Attributes:
        steps: duration in seconds and number of outputs of each step.
        tokens: the answer's tokens, by request.
        errors: the errors of the requests that failed.
    """

    steps: list[tuple[float, int]] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, LoramillError] = field(default_factory=dict)

    def full_steps(self, rows: int) -> list[float]:
        """Seconds of the steps in which all of `rows` answers got a token, without the first five."""
        return [seconds for seconds, outputs in self.steps if outputs == rows][5:]


class EngineSession:
    """An engine and its requests.

    Attributes:
        engine: the engine.
        model: what it runs.
    """

    def __init__(self, engine: Engine, model: Model) -> None:
        self.engine = engine
        self.model = model
        self._random = random.Random(0)
        self._ids = map(str, itertools.count())

    def prompt(self, length: int) -> list[int]:
        """A random prompt."""
        return [self._random.randrange(3, self.model.vocabulary) for _ in range(length)]

    def submit(self, prompt: Sequence[int], new: int, version: str | None = None, **sampling: Any) -> str:
        """Submits a request; returns its id."""
        id_ = next(self._ids)
        params = SamplingParams(max_tokens=new, **sampling)
        self.engine.submit(Request(id_, f"tenant {int(id_) % 32}", tuple(prompt), params, version))
        return id_

    def run(self, timeout: float = 60.0) -> Run:
        """Runs steps until no request is left.

        Raises:
            TimeoutError: requests are left after `timeout` seconds.
        """
        run, end = Run(), time.monotonic() + timeout
        while self.engine.stats.running or self.engine.stats.waiting:
            if time.monotonic() > end:
                raise TimeoutError(f"Requests are left after {timeout:g} s.")
            if not self.engine.wait(1.0):
                continue
            begun = time.perf_counter()
            outputs = self.engine.step()
            run.steps.append((time.perf_counter() - begun, len(outputs)))
            for output in outputs:
                run.tokens.setdefault(output.request_id, []).extend(output.tokens)
                if output.error is not None:
                    run.errors[output.request_id] = output.error
        return run

    def first_token_ms(self, prompt: Sequence[int], version: str | None = None) -> float:
        """Milliseconds from a request to its first token, on an idle engine."""
        begun = time.perf_counter()
        self.submit(prompt, 1, version)
        self.run()
        return 1e3 * (time.perf_counter() - begun)

    def decode(self, rows: int, versions: Sequence[str | None], context: int, new: int, **sampling: Any) -> Run:
        """Decodes `rows` random prompts of `context` tokens at once, one per version in turn."""
        for _, version in zip(range(rows), itertools.cycle(versions), strict=False):
            self.submit(self.prompt(context), new, version, **sampling)
        return self.run()


@contextmanager
def engine_session(context: Context, decoder: Decoder, folder: Path) -> Iterator[EngineSession]:
    """An engine over a decoder, and adapters that are written to a folder: versions "0", "1", … and BROKEN."""
    folders = write_adapters(decoder, folder, _FOLDERS + 1)
    _break(folders[-1])
    model = served(decoder)
    config = context.choose(
        EngineConfig(
            max_batch_tokens=2048, max_sequences=128, kv_tokens=160_000, adapter_slots=40, adapter_bytes=5 << 30,
            host_bytes=1 << 30, rank_budget=4096, max_waiting=4096,
        ),
        EngineConfig(kv_tokens=8192, adapter_slots=40, adapter_bytes=32 << 20, host_bytes=1 << 20, rank_budget=4096),
    )  # fmt: skip
    engine = Engine(model, _source(folders), config)
    try:
        yield EngineSession(engine, model)
    finally:
        engine.close()


def _source(folders: Sequence[Path]) -> Callable[[str], Path]:
    return lambda version: folders[-1] if version == BROKEN else folders[int(version) % _FOLDERS]


def _break(folder: Path) -> None:
    weights = load_file(weights_file(folder))
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, weights_file(folder))


def median_ms(seconds: Sequence[float]) -> float:
    """The median in milliseconds; NaN without values."""
    return 1e3 * statistics.median(seconds) if seconds else float("nan")
