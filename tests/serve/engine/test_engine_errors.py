"""Requests that the engine refuses, cancels or fails, on a tiny model; the other requests are unaffected."""

import threading

import pytest
from safetensors.torch import load_file, save_file

from loramill.errors import (
    AdapterInvalid,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    SettingsInvalid,
    Unavailable,
)
from loramill.registry.artifacts.store import ArtifactStore
from loramill.serve.engine import EngineConfig, FinishReason, Request, SamplingParams

from ... import switchable_store
from .conftest import LARGEST


def test_a_request_past_its_deadline_ends_alone(drive, adapters, prompts, expected):
    gate = threading.Event()

    def source(version):
        assert gate.wait(20)
        return adapters[version]

    driver = drive(source)
    driver.submit("late", prompts["lora"], "lora", timeout=0.05)
    driver.submit("patient", prompts["lora"], "lora", timeout=60)
    driver.step()
    # Only time passes.
    assert driver.engine.wait(20)
    driver.step()
    last = driver.answers["late"].last
    assert (last.finish_reason, type(last.error)) == (FinishReason.ERROR, DeadlineExceeded)
    assert "0.05 seconds" in last.error.message
    gate.set()
    assert driver.finish()["patient"] == expected["lora"]
    driver.submit("running", prompts["lora"], "lora", max_tokens=150, timeout=0.02)
    driver.finish()
    assert isinstance(driver.answers["running"].last.error, DeadlineExceeded)


def test_a_store_outage_fails_only_cold_adapters_and_only_while_it_lasts(drive, adapters, prompts, expected, tmp_path):
    switchable_store.clear()
    store = ArtifactStore("switched://bucket/loramill", cache=tmp_path / "cache")
    put = {name: store.put({file.name: file for file in adapters[name].iterdir()}) for name in ("lora", "dora")}
    driver = drive(store.fetch)
    driver.submit("resident", prompts["lora"], put["lora"])
    assert driver.finish()["resident"] == expected["lora"]
    with switchable_store.off(switchable_store.away):
        driver.submit("cold", prompts["dora"], put["dora"])
        driver.submit("resident again", prompts["lora"], put["lora"])
        assert driver.finish()["resident again"] == expected["lora"]
    error = driver.answers["cold"].last.error
    assert type(error) is Unavailable and "switched://bucket/loramill" in error.message
    driver.submit("later", prompts["dora"], put["dora"])
    assert driver.finish()["later"] == expected["dora"]
    with switchable_store.off(switchable_store.away):  # a local copy needs no store
        assert store.fetch(put["dora"]).is_dir()
    switchable_store.clear()


def test_an_adapter_larger_than_the_slab_names_the_setting_to_raise(drive, prompts):
    driver = drive(adapter_bytes=LARGEST - 1)
    driver.submit("a", prompts["all"], "all")
    driver.finish()
    assert isinstance(driver.answers["a"].last.error, AdapterInvalid)
    assert "serve.adapter_bytes" in driver.answers["a"].last.error.message


@pytest.mark.parametrize(
    ("tokens", "sampling", "error", "message"),
    [
        ((), {}, InvalidRequest, "empty"),
        ((1, 101), {}, InvalidRequest, "vocabulary of 101"),
        ((-1,), {}, InvalidRequest, "vocabulary"),
        ((1,) * 256, {}, ContextLengthExceeded, "256 tokens; the base's context holds 256"),
        ((1,) * 97, {}, ContextLengthExceeded, "KV cache holds 96"),
        ((1,), {"max_tokens": 0}, InvalidRequest, "max_tokens is 0"),
        ((1,), {"max_tokens": 0, "logprobs": 1}, InvalidRequest, "max_tokens is 0"),
        ((1,), {"min_tokens": 13}, InvalidRequest, "min_tokens is 13"),
        ((1,), {"min_p": 1.5}, InvalidRequest, "min_p"),
        ((1,), {"repetition_penalty": 0.0}, InvalidRequest, "repetition_penalty"),
        ((1,), {"presence_penalty": float("nan")}, InvalidRequest, "presence_penalty"),
        ((1,), {"frequency_penalty": float("inf")}, InvalidRequest, "frequency_penalty"),
        ((1,), {"logit_bias": ((101, 1.0),)}, InvalidRequest, "token 101"),
        ((1,), {"logit_bias": ((5, float("nan")),)}, InvalidRequest, "logit_bias"),
        ((1,), {"n": 0}, InvalidRequest, "n is 0"),
        ((1,), {"timeout": 0.0}, InvalidRequest, "timeout"),
        ((1,), {"temperature": -0.1}, InvalidRequest, "temperature"),
        ((1,), {"temperature": float("nan")}, InvalidRequest, "temperature"),
        ((1,), {"top_p": 0.0}, InvalidRequest, "top_p"),
        ((1,), {"top_p": 1.1}, InvalidRequest, "top_p"),
        ((1,), {"top_k": -1}, InvalidRequest, "top_k"),
        ((1,), {"seed": 2**63}, InvalidRequest, "seed"),
        ((1,), {"logprobs": 21}, InvalidRequest, "logprobs"),
    ],
)
def test_requests_that_can_never_be_served_are_refused_at_once(drive, tokens, sampling, error, message):
    driver = drive(kv_tokens=103)
    with pytest.raises(error, match=message):
        driver.submit("a", tokens, **sampling)
    driver.engine.check_integrity()
    assert not driver.engine.has_work


def test_a_full_queue_refuses_requests(drive):
    driver = drive(max_waiting=2, max_sequences=1)
    driver.submit("running", [1, 2])
    driver.step()
    driver.submit("a", [1])
    driver.submit("b", [1])
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        driver.submit("c", [1])
    driver.finish()
    driver.submit("c", [1])
    driver.finish()


def test_the_tenant_with_the_longest_queue_gives_way(drive):
    driver = drive(max_waiting=3, max_sequences=1)
    driver.submit("running", [1, 2], tenant="flood")
    driver.step()
    for name in "abc":
        driver.submit(name, [1], tenant="flood")
    driver.submit("x", [1], tenant="quiet")
    with pytest.raises(Overloaded):
        driver.submit("d", [1], tenant="flood")
    driver.finish()
    refused = [name for name, answer in driver.answers.items() if isinstance(answer.last.error, Overloaded)]
    assert refused == ["c"] and driver.answers["c"].tokens == []


def test_an_id_serves_one_request_at_a_time(drive):
    driver = drive()
    driver.submit("a", [1])
    with pytest.raises(Conflict):
        driver.engine.submit(Request("a", "t", (1,), SamplingParams(max_tokens=1)))
    driver.finish()
    driver.submit("a", [1])
    driver.finish()


def test_cancelling_frees_everything_and_is_reported_once(drive, prompts):
    driver = drive(max_sequences=2)
    for id_ in ("running", "other", "waiting"):
        driver.submit(id_, prompts["lora"], "lora")
    driver.engine.wait(20)
    driver.step()
    driver.engine.wait(20)
    driver.step()
    driver.submit("unseen", [1])
    for id_ in ("running", "waiting", "unseen", "unknown"):
        driver.engine.cancel(id_)
        driver.engine.cancel(id_)
    driver.finish()
    finishes = {id_: answer.last.finish_reason for id_, answer in driver.answers.items()}
    assert finishes == {
        "running": FinishReason.CANCELLED,
        "other": FinishReason.LENGTH,
        "waiting": FinishReason.CANCELLED,
        "unseen": FinishReason.CANCELLED,
    }


def test_a_version_that_fails_to_load_fails_its_requests_and_is_retried(drive, adapters, prompts, expected):
    calls = []

    def source(version):
        calls.append(version)
        if len(calls) == 1:
            raise ModelNotFound("gone for a moment")
        if len(calls) == 2:
            raise ZeroDivisionError("a defect in the source")
        return adapters[version]

    driver = drive(source, adapter_slots=1)
    driver.submit("first", prompts["lora"], "lora")
    driver.submit("also first", prompts["lora"], "lora")
    driver.submit("base", prompts[None])
    driver.finish()
    assert driver.answers["base"].tokens == expected["None"]
    for id_ in ("first", "also first"):
        last = driver.answers[id_].last
        assert (last.finish_reason, type(last.error)) == (FinishReason.ERROR, ModelNotFound)
    driver.submit("second", prompts["lora"], "lora")
    driver.finish()
    assert isinstance(driver.answers["second"].last.error, AdapterInvalid)
    driver.submit("third", prompts["lora"], "lora")
    assert driver.finish()["third"] == expected["lora"]
    assert driver.engine.stats.load_failures == 2


def test_an_adapter_whose_logits_overflow_fails_alone(drive, adapters, prompts, expected, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapters["all"] / "adapter_config.json").read_bytes())
    weights = load_file(adapters["all"] / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in weights.items()}, broken / "adapter_model.safetensors")
    # The cache is so small that the others get the blocks with NaN.
    driver = drive(lambda version: broken if version == "broken" else adapters[version], kv_tokens=116)
    for i in range(4):
        driver.submit(f"broken {i}", prompts["all"][:40], "broken", tenant="bad")
    driver.submit_all(prompts)
    answers = driver.finish()
    assert {id_: tokens for id_, tokens in answers.items() if id_ in expected} == expected
    for i in range(4):
        assert answers[f"broken {i}"] == []
        assert isinstance(driver.answers[f"broken {i}"].last.error, AdapterInvalid)


def test_a_failing_decoder_fails_its_step_and_the_engine_continues(drive, monkeypatch, prompts, expected):
    driver = drive(max_sequences=1)
    driver.submit("a", prompts["lora"], "lora")
    driver.submit("lora", prompts["lora"], "lora")
    forward = type(driver.engine._model).forward

    def fail_once(self, *args):
        monkeypatch.setattr(type(self), "forward", forward)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(driver.engine._model), "forward", fail_once)
    assert driver.finish()["lora"] == expected["lora"]
    assert isinstance(driver.answers["a"].last.error, EngineFault)
    assert "out of memory" in driver.answers["a"].last.error.message


def test_a_failing_step_leaves_no_request_hanging(drive, monkeypatch, prompts, expected):
    driver = drive(max_sequences=2)
    driver.submit_all(prompts)
    driver.step()
    with monkeypatch.context() as patch:
        patch.setattr(driver.engine._scheduler, "schedule", lambda ready: 1 / 0)
        driver.submit("new", [1])
        driver.step()
    assert all(isinstance(answer.last.error, EngineFault) for answer in driver.answers.values())
    driver.answers.clear()
    driver.submit_all(prompts)
    assert driver.finish() == expected


def test_a_closed_engine_has_no_threads_and_refuses_requests(drive, prompts):
    # An engine that an earlier test reset may still have threads; they end on their own.
    before = set(threading.enumerate())
    driver = drive()
    driver.submit("a", prompts["lora"], "lora")
    driver.step()
    assert any(thread.name.startswith("adapter-") for thread in set(threading.enumerate()) - before)
    driver.engine.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("adapter-")]
    with pytest.raises(Unavailable):
        driver.submit("b", [1])


@pytest.mark.parametrize("wrong", [{"max_batch_tokens": 0}, {"adapter_slots": 0}, {"kv_tokens": 8}, {"block_size": 8}])
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(SettingsInvalid, match=next(iter(wrong))):
        EngineConfig(**wrong)
