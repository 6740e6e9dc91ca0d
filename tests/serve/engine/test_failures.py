"""Failures of the model: memory that runs out ends one request, a device that fails ends the engine."""

from __future__ import annotations

import pytest
import torch

from loramill.errors import EngineFault, Unavailable
from loramill.serve.engine import FinishReason, Request, SamplingParams, failures
from loramill.serve.engine.failures import FailureKind, ModelFailure, Recovery, recover_from_out_of_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def fail_steps(driver, monkeypatch, should_fail, error=None):
    """Makes the model raise in the steps whose chunks fulfill a condition; returns the chunks of all attempts."""
    kind = type(driver.engine._model)
    forward, attempts = kind.forward, []

    def failing(self, chunks, *args):
        attempts.append(list(chunks))
        if should_fail(chunks):
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB.")
        return forward(self, chunks, *args)

    monkeypatch.setattr(kind, "forward", failing)
    return attempts


@pytest.mark.parametrize(
    ("ids", "decodes", "first", "recovery"),
    [
        ([4, 7, 5], [True, True, True], True, Recovery(None, (0, 1, 2))),
        ([4, 7, 5], [True, True, True], False, Recovery(1, (0, 2))),
        ([4], [True], False, Recovery(0, ())),
        ([4, 7, 5], [True, False, False], True, Recovery(1, (0,))),
        ([4, 7, 5], [False, True, False], True, Recovery(2, (1,))),
        ([9, 3], [True, False], False, Recovery(1, (0,))),
        ([3], [False], True, Recovery(0, ())),
    ],
)
def test_the_newest_prompt_ends_and_the_decodes_run_again(ids, decodes, first, recovery):
    assert recover_from_out_of_memory(ids, decodes, first=first) == recovery


def test_an_error_after_which_the_device_does_not_synchronize_is_a_lost_device(monkeypatch):
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert ModelFailure.of(error, CPU).kind is FailureKind.STEP
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert ModelFailure.of(error, CUDA).kind is FailureKind.STEP

    def broken(device):
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    failure = ModelFailure.of(error, CUDA)
    assert failure.kind is FailureKind.DEVICE_LOST and "device-side assert" in failure.message
    assert ModelFailure.of(torch.OutOfMemoryError(), CUDA).kind is FailureKind.OUT_OF_MEMORY


def test_a_prompt_without_memory_ends_alone(drive, monkeypatch, prompts, expected):
    driver = drive()
    driver.submit_all({None: prompts[None]})
    driver.step()
    attempts = fail_steps(driver, monkeypatch, lambda chunks: any(len(chunk.tokens) > 50 for chunk in chunks))
    driver.submit("long", [1] * 60)
    driver.step()
    assert [len(chunks) for chunks in attempts] == [2, 1]
    last = driver.answers["long"].last
    assert last.finish_reason is FinishReason.ERROR and isinstance(last.error, Unavailable)
    assert "60 tokens" in last.error.message
    assert len(driver.answers["None"].tokens) == 2
    assert driver.finish()["None"] == expected["None"]


def test_older_prompts_run_in_the_next_step(drive, monkeypatch):
    driver = drive()
    driver.submit("older", [2] * 20)
    alone = driver.finish()["older"]
    driver.answers.clear()
    driver.submit("older", [2] * 20)
    driver.submit("newer", [1] * 40)
    attempts = fail_steps(driver, monkeypatch, lambda chunks: len(chunks) > 1)
    driver.step()
    assert len(attempts) == 1
    assert isinstance(driver.answers["newer"].last.error, Unavailable) and driver.answers["older"].last is None
    assert driver.finish()["older"] == alone


def test_decodes_run_again_once_the_cached_memory_is_free(drive, monkeypatch, prompts, expected):
    driver = drive()
    driver.submit("a", prompts[None])
    driver.submit("b", [1, 2])
    driver.step()
    attempts = fail_steps(driver, monkeypatch, lambda chunks: len(attempts) == 1)
    driver.step()
    assert [len(chunks) for chunks in attempts] == [2, 2]
    assert all(answer.last is None and len(answer.tokens) == 2 for answer in driver.answers.values())
    assert driver.finish()["a"] == expected["None"]


def test_the_newest_decode_ends_if_there_is_no_memory_for_all(drive, monkeypatch, prompts, expected):
    driver = drive()
    driver.submit("a", prompts[None])
    driver.submit("b", [1, 2])
    driver.step()
    attempts = fail_steps(driver, monkeypatch, lambda chunks: len(chunks) > 1)
    driver.step()
    assert [len(chunks) for chunks in attempts] == [2, 2, 1]
    assert isinstance(driver.answers["b"].last.error, Unavailable)
    assert driver.finish()["a"] == expected["None"]


def test_a_lost_device_ends_all_answers_and_the_engine(drive, monkeypatch, prompts):
    driver = drive(max_sequences=1)
    driver.submit("running", prompts[None])
    driver.submit("waiting", [1])
    driver.step()
    monkeypatch.setattr(failures, "device_works", lambda device: False)
    fail_steps(driver, monkeypatch, lambda chunks: True, RuntimeError("CUDA error: unspecified launch failure"))
    assert not driver.engine.device_lost
    driver.engine.submit(Request("new", "t", (1,), SamplingParams(max_tokens=1)))
    outputs = driver.engine.step()
    assert {output.request_id for output in outputs} == {"running", "waiting", "new"}
    assert all(isinstance(output.error, Unavailable) and "launch failure" in output.error.message for output in outputs)
    assert driver.engine.device_lost and not driver.engine.has_work
    with pytest.raises(Unavailable):
        driver.submit("after", [1])
    assert driver.engine.step() == []


def test_a_device_lost_outside_the_model_ends_the_engine(drive, monkeypatch, prompts):
    driver = drive()
    driver.submit("a", prompts[None])
    monkeypatch.setattr(failures, "device_works", lambda device: False)
    monkeypatch.setattr(driver.engine._scheduler, "schedule", lambda ready: 1 / 0)
    (output,) = driver.engine.step()
    assert isinstance(output.error, Unavailable) and driver.engine.device_lost


def test_another_failure_ends_its_step_alone(drive, monkeypatch, prompts):
    driver = drive()
    driver.submit("a", prompts[None])
    fail_steps(driver, monkeypatch, lambda chunks: True, RuntimeError("shapes"))
    driver.step()
    assert isinstance(driver.answers["a"].last.error, EngineFault) and not driver.engine.device_lost
