"""Adapters that are copied while the engine steps."""

import threading

import pytest
import torch

from loramill.errors import Unavailable
from loramill.kernels.adapters import slab
from loramill.kernels.adapters.copy_stream import HostCopies
from loramill.serve.engine import Engine, EngineConfig
from loramill.serve.model import load_model

from ..conftest import Driver


class HeldCopies(HostCopies):
    """Copies that end when a test lets them."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def copy(self, source, target, after):
        self.begun.set()
        assert self.go.wait(60)
        super().copy(source, target, after)


def test_steps_go_on_during_a_copy_and_the_slot_is_used_only_after_it(drive, prompts, expected, monkeypatch):
    copies = HeldCopies()
    monkeypatch.setattr(slab, "new_copy_stream", lambda device: copies)
    driver = drive()
    driver.submit("steady", prompts[None], max_tokens=200)
    driver.submit("loading", prompts["all"], "all")
    while not copies.begun.is_set():
        driver.step()
    before = len(driver.answers["steady"].tokens)
    for _ in range(5):
        driver.step()
    assert len(driver.answers["steady"].tokens) == before + 5
    assert driver.answers["loading"].tokens == [] and driver.engine.stats.resident == ()
    copies.go.set()
    assert driver.finish()["loading"] == expected["all"]


def test_a_copy_that_is_under_way_at_a_reset_goes_to_the_old_slab(drive, prompts, expected, monkeypatch):
    made = []

    def make(device):
        made.append(HeldCopies())
        return made[-1]

    monkeypatch.setattr(slab, "new_copy_stream", make)
    driver = drive()
    driver.submit("a", prompts["all"], "all")
    while not made[0].begun.is_set():
        driver.step()
    old = driver.engine._adapters
    with monkeypatch.context() as patch:
        patch.setattr(driver.engine._scheduler, "schedule", lambda ready: 1 / 0)
        driver.step()
    made[1].go.set()
    driver.submit("b", prompts["lora"], "lora")
    assert driver.finish()["b"] == expected["lora"]
    made[0].go.set()
    old.close(wait=True)
    assert driver.engine.stats.resident == ("lora",)


def test_without_memory_for_a_load_only_its_requests_end(drive, prompts, expected, monkeypatch):
    def norms(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    driver = drive()
    base = driver.engine._adapters._loader._base
    with monkeypatch.context() as patch:
        patch.setattr(type(base), "norms_of", norms)
        driver.submit("dora", prompts["dora"], "dora")
        driver.submit("base", prompts[None])
        assert driver.finish()["base"] == expected["None"]
    assert isinstance(driver.answers["dora"].last.error, Unavailable)
    driver.submit("later", prompts["dora"], "dora")
    assert driver.finish()["later"] == expected["dora"]


def test_an_engine_is_warm_once_its_host_cache_is_ready(drive, monkeypatch):
    driver = drive()
    waited = []
    monkeypatch.setattr(driver.engine._adapters, "wait_until_prepared", lambda: waited.append(True))
    driver.engine.warm_up()
    assert waited


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adapters_that_replace_one_another_during_decodes(tiny_folder, adapters, prompts, expected, device):
    """Two slots for six adapters: each is copied over another one, often while a step reads that."""
    model = load_model(tiny_folder, dtype=torch.float32, device=device)
    config = EngineConfig(kv_tokens=1024, adapter_slots=2, host_bytes=1 << 20, slot_patience_steps=2)
    driver = Driver(Engine(model, adapters.__getitem__, config))
    try:
        driver.engine.warm_up((4, 16))
        for _ in range(3):
            driver.submit_all(prompts)
            assert driver.finish() == expected
        assert driver.engine.stats.evictions > 9
        assert driver.engine.stats.failed_captures == 0
    finally:
        driver.engine.close()
