"""The soak covers every event that it should, and detects an engine with one defect."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loramill.errors import EngineFault, Unavailable
from loramill.models.catalog import Base
from loramill.serve.engine import Engine, FinishReason, model_runner
from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.engine.request_table import RequestTable
from loramill.serve.engine.scheduling import scheduler
from loramill.serve.engine.scheduling.block_pool import BlockPool, root_key
from loramill_bench.engine import harness as harnesses
from loramill_bench.engine import memory
from loramill_bench.results import Result
from loramill_bench.soak import run as soaks
from loramill_bench.soak import tracker
from loramill_bench.soak.run import soak

VOCABULARY = 101

MET = (
    *(f"answers: {end}" for end in ("length", "stop", "cancelled", "refused", "DeadlineExceeded")),
    "answers compared with the expected ones",
    "tokens reused from the prefix cache",
    "steps with waiting answers",
    "preemptions",
    "adapters evicted",
    "failed loads",
    "idle time",
)


#: Seconds without an output after which a soak fails; a canary on a busy machine has taken more than 0.5.
PATIENCE = 3.0


@pytest.fixture(scope="module")
def base(tiny_base) -> Base:
    return tiny_base


@pytest.fixture(autouse=True)
def strong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that change the tokens."""
    monkeypatch.setattr(harnesses, "_WEIGHT_STD", 0.3)


def test_every_event_is_covered_and_nothing_is_left_behind(base, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(soaks, "_REPORT_SECONDS", 0.5)
    monkeypatch.setattr(soaks, "_CHECK_SECONDS", 0.05)
    lines: list[str] = []
    values: Counter[str] = Counter()
    # What a short soak covers is random, and less on a busy machine.
    for seed in range(60):
        began = time.monotonic()
        results = soak(base, 2.0, lines.append, seed=seed)
        assert 2.0 < time_of(results) < time.monotonic() - began
        assert [result.case for result in results if result.target is not None] == ["soak: memory growth"]
        values.update({result.case.removeprefix("soak: "): result.value for result in results})
        if all(values[name] > 0 for name in MET):
            break
    assert all(values[name] > 0 for name in MET), values
    assert values["answers compared with the expected ones"] > 20
    assert values["steps with waiting answers"] < values["steps"]
    assert lines[0].startswith("Serving the canaries")
    assert any(" open; " in line and line.endswith(" MiB") for line in lines)
    assert list(tmp_path.iterdir()) == []
    assert caplog.records == []


def time_of(results: list[Result]) -> float:
    return next(result.value for result in results if result.case == "soak: time")


def drop_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last output of some answers is not returned."""
    monkeypatch.setattr(tracker, "PATIENCE", PATIENCE)
    _alter_outputs(monkeypatch, lambda output: [], when=lambda output: output.finish_reason == FinishReason.LENGTH)


def drop_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some outputs before the last are not returned."""
    _alter_outputs(monkeypatch, lambda output: [], when=lambda output: output.finish_reason is None)


def continue_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last output of some answers is returned twice."""
    _alter_outputs(monkeypatch, lambda output: [output, output], when=lambda output: output.finish_reason is not None)


def find_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the engine finds no work."""
    monkeypatch.setattr(tracker, "PATIENCE", PATIENCE)
    count, wait = itertools.count(), Engine.wait

    def blind(self: Engine, timeout: float) -> bool:
        if serves_canaries_alone(self) or next(count) < 100:
            return wait(self, timeout)
        time.sleep(timeout)
        return False

    monkeypatch.setattr(Engine, "wait", blind)


def give_wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """If three decode together, the last gets a token that was not sampled from its row."""
    sample = model_runner.sample

    def wrong(logits: torch.Tensor, samplers: list) -> list[int | None]:
        chosen = sample(logits, samplers)
        if len(samplers) >= 3 and chosen[-1] is not None:
            chosen[-1] = (chosen[-1] + 1) % VOCABULARY
        return chosen

    monkeypatch.setattr(model_runner, "sample", wrong)


def share_prefixes_between_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt reuses the KV of another adapter."""
    monkeypatch.setattr(scheduler, "root_key", lambda version: root_key(None))


def take_slots_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version may lose its slot while answers use it."""
    monkeypatch.setattr(Residency, "begin_use", lambda self, version: None)
    monkeypatch.setattr(Residency, "end_use", lambda self, version: None)


def leak_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the blocks that a sequence releases is never freed."""
    free = BlockPool.free
    monkeypatch.setattr(BlockPool, "free", lambda self, blocks: free(self, blocks[1:]))


def ignore_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled request continues."""
    monkeypatch.setattr(Engine, "cancel", lambda self, request_id: None)


def ignore_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request past its timeout continues."""
    monkeypatch.setattr(RequestTable, "take_overdue", lambda self, scheduled: [])


def _alter_outputs(monkeypatch: pytest.MonkeyPatch, change: Callable, when: Callable) -> None:
    count, step = itertools.count(), Engine.step

    def altered(self: Engine) -> list:
        return [
            returned
            for output in step(self)
            for returned in (
                change(output)
                if not serves_canaries_alone(self) and when(output) and next(count) % 10 == 9
                else [output]
            )
        ]

    monkeypatch.setattr(Engine, "step", altered)


def serves_canaries_alone(engine: Engine) -> bool:
    """Whether the engine is the one that serves the canaries alone, whose answers must be right."""
    return not engine._config.prefix_cache


@pytest.mark.parametrize(
    ("break_", "complaint"),
    [
        (
            drop_an_end,
            r"No output for \d+ s, and \d+ answers are open: \['\d+\[\d\] of version|are still open after it",
        ),
        (drop_a_token, r"has the tokens|ended by|echoes|log probabilities"),
        (continue_after_the_end, "has ended or was not requested"),
        (find_nothing_to_do, "No output for"),
        (give_wrong_tokens, "alone they were|ended by stop"),
        (share_prefixes_between_versions, "alone"),
        (take_slots_in_use, "versions of running requests"),
        (leak_a_block, "reference counts"),
        (ignore_cancels, "are still open after it"),
        (ignore_timeouts, "are still open after it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_defect_is_detected(base, monkeypatch: pytest.MonkeyPatch, break_: Callable, complaint: str) -> None:
    break_(monkeypatch)
    with pytest.raises(EngineFault, match=complaint):
        soak(base, 30.0, lambda line: None, seed=2)


def test_an_error_of_a_client_ends_the_soak(base, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, count = Engine.submit, itertools.count()

    def closed(self: Engine, request) -> None:
        if next(count) > 60:
            raise Unavailable("The engine is closed.")
        submit(self, request)

    monkeypatch.setattr(Engine, "submit", closed)
    with pytest.raises(Unavailable):
        soak(base, 60.0, lambda line: None)


@pytest.mark.parametrize(("step", "met"), [(0, True), (50 << 20, False)])
def test_growing_memory_misses_its_target(base, monkeypatch: pytest.MonkeyPatch, step: int, met: bool) -> None:
    sizes = itertools.count(200 << 20, step)
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(soaks, "_CHECK_SECONDS", 0.05)
    *_, growth = soak(base, 1.0, lambda line: None)
    assert growth.case == "soak: memory growth"
    assert growth.met is met


def test_memory_that_cannot_be_read_is_left_out(base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATM", tmp_path / "nothing")
    cases = [result.case for result in soak(base, 0.2, lambda line: None)]
    assert not any("memory" in case for case in cases)
