"""Copies to a device that computes: on a simulated device with two streams, and the calls for a real one."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.kernels import Batch, PackedAdapter, Slab, Slot, memory
from loramill.kernels.adapters import copy_stream
from loramill.kernels.adapters.copy_stream import CudaCopyStream, HostCopies, new_copy_stream
from loramill.kernels.adapters.packing import ROWS, Site
from loramill.kernels.memory import page_locked, page_locked_blocks

LINE, STAGE = 64, 1000


@dataclass
class Device:
    """Two streams whose operations run when a test lets them."""

    queues: dict[str, deque] = field(default_factory=lambda: {"compute": deque(), "copy": deque()})
    ended: set[object] = field(default_factory=set)

    def launch(self, stream: str, effect: Callable[[], None] | None = None, after: object = None) -> object:
        operation = object()
        self.queues[stream].append((operation, effect, after))
        return operation

    def runnable(self) -> list[str]:
        heads = {name: queue[0] for name, queue in self.queues.items() if queue}
        return [name for name, (_, _, after) in heads.items() if after is None or after in self.ended]

    def advance(self, stream: str) -> None:
        operation, effect, _ = self.queues[stream].popleft()
        if effect is not None:
            effect()
        self.ended.add(operation)

    def drain(self) -> None:
        while runnable := self.runnable():
            self.advance(runnable[0])
        assert not any(self.queues.values()), "an operation waits for ever"


class SimulatedCopies:
    """`CopyStream` on a simulated device; `meanwhile` is what happens while a copy is waited for."""

    def __init__(self, device: Device, *, waits: bool = True) -> None:
        self.device, self.waits = device, waits
        self.meanwhile: Callable[[], None] = device.drain

    def mark(self):
        return self.device.launch("compute")

    def copy(self, source, target, after):
        assert after is not None
        half = len(source) // 2
        self.device.launch("copy", lambda: target[:half].copy_(source[:half]), after if self.waits else None)
        last = self.device.launch("copy", lambda: target[half:].copy_(source[half:]))
        while last not in self.device.ended:
            self.meanwhile()


class Engine:
    """A slab on a simulated device, and steps that read the adapters in it when the device runs them."""

    def __init__(self, *, slots: int, lines: int, waits: bool = True) -> None:
        self.device = Device()
        self.copies = SimulatedCopies(self.device, waits=waits)
        site = Site(8, ("q",), (8,))
        self.slab = Slab([site], slots=slots, size=LINE * lines, dtype=torch.float32, layout=ROWS, copies=self.copies)
        self.loaded: dict[Slot, int] = {}
        self.wrong: list[str] = []
        self._contents = iter(range(1, 250))

    def allocate(self, lines: int) -> tuple[Slot, PackedAdapter] | None:
        slot = self.slab.allocate(LINE * lines)
        if slot is None:
            return None
        data = torch.full((LINE * lines,), next(self._contents), dtype=torch.uint8)
        return slot, PackedAdapter(data, np.array([[[0, 0, -1, 1]]], np.int64))

    def load(self, slot: Slot, adapter: PackedAdapter) -> None:
        self.slab.load(slot, adapter)
        self.loaded[slot] = int(adapter.data[0])
        adapter.data.fill_(255)  # its memory is reused once `load` has returned

    def free(self, slot: Slot) -> None:
        del self.loaded[slot]
        self.slab.free(slot)

    def step(self) -> None:
        """Launches a step of all loaded adapters."""
        self.slab.check(Batch.of([(slot, 1) for slot in self.loaded]))
        expected = dict(self.loaded)
        parts = {}
        for slot in expected:
            allocation = self.slab._allocation(slot)
            start = int(self.slab.table[0, slot.index, 0, 0])
            parts[slot] = slice(start, start + allocation.size)

        def read():
            for slot, content in expected.items():
                if not self.slab.arena[parts[slot]].eq(content).all():
                    self.wrong.append(f"{slot} has other bytes than {content}")

        self.device.launch("compute", read)


@settings(max_examples=150)
@given(data=st.data(), slots=st.integers(1, 4), lines=st.integers(2, 6))
def test_a_step_reads_its_adapters_whenever_the_device_runs_it(data, slots, lines):
    engine = Engine(slots=slots, lines=lines)
    device, waiting = engine.device, []

    def act(*, loading: bool) -> None:
        """One thing that the engine's thread or the device does; the loader's thread loads one adapter at a time."""
        actions = ["step", "allocate", *device.runnable()]
        actions += ["free"] if engine.loaded else []
        actions += ["load"] if waiting and not loading else []
        action = data.draw(st.sampled_from(actions))
        if action == "allocate":
            waiting.extend(filter(None, [engine.allocate(data.draw(st.integers(1, 3)))]))
        elif action == "free":
            engine.free(data.draw(st.sampled_from(sorted(engine.loaded))))
        elif action == "load":
            engine.load(*waiting.pop(0))
        elif action == "step":
            engine.step()
        else:
            device.advance(action)

    budget = iter(range(40))
    engine.copies.meanwhile = lambda: act(loading=True) if next(budget, None) is not None else device.drain()
    for _ in range(data.draw(st.integers(1, 25))):
        act(loading=False)
        engine.slab.check_integrity()
    device.drain()
    assert not engine.wrong


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_into_a_freed_slot_waits_for_the_steps_that_read_it(waits):
    engine = Engine(slots=1, lines=1, waits=waits)
    engine.load(*engine.allocate(1))
    engine.step()
    engine.free(*engine.loaded)
    slot, adapter = engine.allocate(1)
    engine.copies.meanwhile = lambda: engine.device.advance(engine.device.runnable()[-1])  # the copy as soon as it can
    engine.load(slot, adapter)
    engine.device.drain()
    # Without the wait, the simulation shows the fault.
    assert bool(engine.wrong) is not waits


def test_a_copy_waits_for_what_read_its_own_bytes_and_not_for_later_steps():
    engine = Engine(slots=2, lines=2)
    first = engine.allocate(1)
    second = engine.allocate(1)
    engine.load(*first)
    engine.step()
    # The second slot has never been read: only the filling of the arena precedes.
    engine.copies.meanwhile = lambda: engine.device.advance("copy")
    engine.load(*second)
    assert len(engine.device.queues["compute"]) == 1


def test_on_the_cpu_nothing_is_pending():
    copies, target = new_copy_stream(torch.device("cpu")), torch.zeros(3, dtype=torch.uint8)
    assert isinstance(copies, HostCopies) and copies.mark() is None
    copies.copy(torch.tensor([1, 2, 3], dtype=torch.uint8), target, None)
    assert target.tolist() == [1, 2, 3]


@pytest.fixture
def calls(monkeypatch):
    """The calls of CUDA, in order; copies are carried out at once."""
    log: list[Any] = []

    class Stream:
        def __init__(self, device=None, priority=0):
            self.name = "copy" if priority else "compute"

        def wait_event(self, event):
            log.append(("wait", self.name, event.point))

    class Event:
        def __init__(self, blocking=False):
            self.blocking, self.point = blocking, None

        def record(self, stream):
            log.append(("record", stream.name))
            self.point = (stream.name, len(log))

        def synchronize(self):
            assert self.blocking
            if self.point is not None:
                log.append(("host waits", *self.point))

    @contextmanager
    def on(stream):
        log.append(("on", stream.name))
        yield
        log.append("off")

    copy = torch.Tensor.copy_

    def copied(self, source, non_blocking=False):
        if non_blocking:
            log.append(("copy", len(source), source.is_pinned()))
        return copy(self, source)

    locked: list[torch.Tensor] = []

    def lock(size):
        locked.append(torch.zeros(size, dtype=torch.uint8))
        return locked[-1]

    def pinned(self):
        return any(0 <= self.data_ptr() - each.data_ptr() < each.numel() for each in locked)

    compute = Stream()
    for name, fake in (("Stream", Stream), ("Event", Event), ("stream", on), ("current_stream", lambda _: compute)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "is_pinned", pinned)
    monkeypatch.setattr(copy_stream, "page_locked", lock)
    monkeypatch.setattr(copy_stream, "STAGE_BYTES", STAGE)
    return log


def test_page_locked_memory_is_copied_at_once(calls):
    copies = CudaCopyStream(torch.device("cuda", 0))
    source, target = copy_stream.page_locked(3 * STAGE).fill_(7), torch.zeros(3 * STAGE, dtype=torch.uint8)
    copies.copy(source, target, copies.mark())
    assert calls == [
        ("record", "compute"),
        ("on", "copy"),
        ("wait", "copy", ("compute", 1)),
        ("copy", 3 * STAGE, True),
        ("record", "copy"),
        ("host waits", "copy", 5),
        "off",
    ]
    assert target.eq(7).all()


def test_other_memory_is_copied_through_two_buffers_that_are_not_refilled_too_early(calls):
    copies = CudaCopyStream(torch.device("cuda", 0))
    mark = copies.mark()
    calls.clear()
    size = 3 * STAGE + 5
    source, target = (torch.arange(size) % 251).to(torch.uint8), torch.zeros(size, dtype=torch.uint8)
    copies.copy(source, target, mark)
    assert torch.equal(target, source)
    assert calls == [
        ("on", "copy"),
        ("wait", "copy", ("compute", 1)),
        ("copy", STAGE, True),
        ("record", "copy"),
        ("copy", STAGE, True),
        ("record", "copy"),
        ("host waits", "copy", 4),  # the third piece takes the first buffer
        ("copy", STAGE, True),
        ("record", "copy"),
        ("host waits", "copy", 6),
        ("copy", 5, True),
        ("record", "copy"),
        ("record", "copy"),
        ("host waits", "copy", 13),
        "off",
    ]


def test_without_page_locked_memory_the_driver_copies(calls, monkeypatch):
    monkeypatch.setattr(copy_stream, "page_locked", lambda size: None)
    copies = CudaCopyStream(torch.device("cuda", 0))
    source, target = torch.ones(9, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    copies.copy(source, target, copies.mark())
    assert ("copy", 9, False) in calls and calls[-2][0] == "host waits"
    assert torch.equal(target, source)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is page-locked memory")
def test_a_lack_of_page_locked_memory_is_logged_once(caplog):
    memory._warn_of_pageable_memory.cache_clear()
    with caplog.at_level(logging.WARNING, "loramill.kernels.memory"):
        blocks = page_locked_blocks(5 << 20)
        assert page_locked(1 << 20) is None
    assert [len(block) for block in blocks] == [5 << 20]
    assert len(caplog.records) == 1 and "page-locked" in caplog.text


def test_page_locked_blocks_are_powers_of_two_and_fill_the_size(monkeypatch):
    requested = []

    def lock(size):
        requested.append(size)
        return torch.zeros(size, dtype=torch.uint8) if len(requested) < 3 else None

    monkeypatch.setattr(memory, "page_locked", lock)
    blocks = page_locked_blocks((13 << 20) + 700)
    assert requested == [8 << 20, 4 << 20, 1 << 20]
    # The last one could not be locked, and is there all the same.
    assert [len(block) for block in blocks] == requested
    assert page_locked_blocks(1000) == []


@pytest.mark.gpu
@pytest.mark.parametrize("locked", [True, False])
def test_on_a_gpu_a_copy_waits_for_its_mark_and_the_computation_for_no_copy(locked):
    device = torch.device("cuda", torch.cuda.current_device())
    size = 32 << 20
    copies, arena = new_copy_stream(device), torch.ones(size, dtype=torch.uint8, device=device)
    source = torch.full((size,), 2, dtype=torch.uint8, pin_memory=locked)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    before = arena.clone()
    mark = copies.mark()
    copies.copy(source, arena, mark)
    assert mark.query()
    assert before.eq(1).all() and arena.eq(2).all()
    # A computation that began after the mark is still running when the copy has ended.
    mark = copies.mark()
    torch.cuda._sleep(2_000_000_000)
    running = torch.cuda.Event()
    running.record()
    copies.copy(source, arena, mark)
    assert not running.query()
