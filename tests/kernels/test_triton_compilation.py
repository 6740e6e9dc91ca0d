"""Kernels are compiled in parallel and without a launch, here for sm_90 by a driver without a GPU."""

import ast
import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from loramill.kernels import Batch, Delta, Site, Slab  # noqa: E402
from loramill.kernels.triton import kernels, layout, lora, parallel_compilation  # noqa: E402

#: No other test's.
DEVICE = 5


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


class Driver:
    """A driver that notes launches."""

    def __init__(self):
        self.launched, self.devices = [], set()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        )

    def get_current_device(self):
        return DEVICE

    def set_current_device(self, device):
        self.devices.add(device)

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        return lambda *_: self.launched.append(source.name)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(driver, "_active", Driver())
    yield driver.active
    for kernel in (kernels.fused_row, kernels.shrink_rows, kernels.expand_rows):
        kernel.device_caches.pop(DEVICE, None)


@pytest.fixture
def step():
    """Runs a site's adapters for some rows."""
    slab = Slab([Site(64, ("q",), (64,))], slots=1, size=1 << 16, dtype=torch.bfloat16, layout=layout)
    packed = slab.pack({"q": Delta(torch.zeros(16, 64), torch.zeros(64, 16))})
    slot = slab.allocate(packed.bytes)
    slab.load(slot, packed)

    def run(rows):
        x, y = (torch.zeros(rows, 64, dtype=torch.bfloat16) for _ in range(2))
        lora(x, y, slab.views[0], Batch.of([(slot, rows)]))

    return run


def test_kernels_are_compiled_before_they_are_launched(gpu, step, monkeypatch, caplog):
    with parallel_compilation():
        for rows in (1, 2, 40, 41, 1):
            step(rows)
    assert not caplog.text
    assert not gpu.launched and gpu.devices == {DEVICE}
    assert knobs.runtime.jit_cache_hook is None
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]))
    for rows in (2, 41):
        step(rows)
    assert not compiled
    assert gpu.launched == ["fused_row", "shrink_rows", "expand_rows"]


@pytest.fixture
def collections_switch_threads():
    """Garbage is collected 14 times as often as usual, and each collection lets another thread run."""

    def switch(*_):
        time.sleep(0)

    thresholds = gc.get_threshold()
    gc.callbacks.append(switch)
    gc.set_threshold(50)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(switch)


def test_threads_may_parse_kernels_at_the_same_time(collections_switch_threads):
    def parse_below(frames):
        return parse_below(frames - 1) if frames else ast.dump(kernels.expand_rows.parse())

    with parallel_compilation(), ThreadPoolExecutor(4) as pool:
        trees = set(pool.map(parse_below, [0, 20, 40, 60] * 10))
    assert len(trees) == 1


def test_a_kernel_that_cannot_be_compiled_is_an_error_when_it_is_launched(gpu, step, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("ptxas failed")

    step_cache = kernels.fused_row.device_caches[DEVICE]
    monkeypatch.setattr(kernels.fused_row, "compile", broken)
    with parallel_compilation():
        step(1)
    assert not step_cache[0]
    assert "was not compiled ahead: RuntimeError('ptxas failed')" in caplog.text
    with pytest.raises(RuntimeError, match="ptxas failed"):
        step(1)
    assert not gpu.launched
