"""Passes launched ahead, with a decoder on the CPU that the engine takes for one that runs asynchronously."""

import random
from array import array

import pytest
import torch

from loramill.serve.engine import Engine, EngineConfig, FinishReason, model_runner
from loramill.serve.engine.ahead import AheadPass, PendingTokens
from loramill.serve.engine.scheduling.scheduler import ScheduledChunk, Scheduler
from loramill.serve.engine.scheduling.sequence import RunningSequence
from loramill.serve.model import Chunk

from .conftest import VOCABULARY, Driver
from .test_masks import Steps


class Asynchronous:
    """A decoder that keeps a log of its passes and of when the host reads tokens."""

    asynchronous = True

    def __init__(self, decoder):
        self._decoder, self.log = decoder, []

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def forward(self, chunks, cache, slab, batch, tokens=None):
        self.log.append(("pass" if tokens is None else "ahead", len(chunks)))
        return self._decoder.forward(chunks, cache, slab, batch, tokens)


@pytest.fixture
def asynchronous(tiny, monkeypatch):
    model = Asynchronous(tiny)

    class Logged(PendingTokens):
        def read(self):
            model.log.append("read")
            return super().read()

    monkeypatch.setattr(model_runner, "PendingTokens", Logged)
    return model


@pytest.fixture
def ahead(asynchronous, adapters):
    """Makes drivers of an asynchronous model that are closed when the test ends."""
    made = []

    def make(**config):
        config = EngineConfig(**{"block_size": 16, "kv_tokens": 1024, **config})
        made.append(Driver(Engine(asynchronous, adapters.__getitem__, config)))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.close()


def test_the_next_pass_is_launched_before_the_tokens_are_read(ahead, asynchronous):
    driver = ahead()
    for name in ("a", "b"):
        driver.submit(name, [1, 2, 3], max_tokens=5)
    answers = driver.finish()
    assert [len(answer) for answer in answers.values()] == [5, 5]
    # The prompts; then a pass for each further token, launched before the token of the step before it is read.
    assert asynchronous.log == [("pass", 2), *[("ahead", 2), "read"] * 4, "read"]


def test_answers_under_all_loads_are_those_without_it(ahead, asynchronous, prompts, monkeypatch):
    """Arrivals, cancellations, stops, masks, penalties and too little memory, with and without passes ahead."""
    samplings = [
        {},
        {"temperature": 1.0, "seed": 1, "top_p": 0.9},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 3, "stop_ids": tuple(range(0, VOCABULARY, 7))},
        {"mask": Steps},
        {"temperature": 1.0, "seed": 2, "n": 2, "min_tokens": 1, "stop_ids": tuple(range(0, VOCABULARY, 3))},
        {"logprobs": 1, "max_tokens": 3},
    ]

    def answers(seed):
        draw, driver = random.Random(seed), ahead(kv_tokens=144, max_sequences=5, max_waiting=99)
        driver.warm(*prompts)
        asynchronous.log.clear()
        for number in range(12):
            version = draw.choice([*prompts])
            sampling = {"max_tokens": draw.choice([1, 9, 40]), **draw.choice(samplings)}
            driver.submit(str(number), prompts[version], version, tenant=draw.choice("ab"), **sampling)
            for _ in range(draw.randrange(9)):
                driver.step()
            if draw.random() < 0.2:
                driver.engine.cancel(str(draw.randrange(number + 1)))
        driver.finish()
        return {name: (answer.tokens, answer.last.finish_reason) for name, answer in driver.answers.items()}, driver

    preemptions = passes = 0
    for seed in range(4):
        got, driver = answers(seed)
        passes += sum(entry[0] == "ahead" for entry in asynchronous.log)
        preemptions += driver.engine.stats.preemptions
        with monkeypatch.context() as patch:
            patch.setattr(model_runner.ModelRunner, "_run_ahead", lambda *_: None)
            due, _ = answers(seed)
        assert not any(entry[0] == "ahead" for entry in asynchronous.log)
        assert got == due
        reasons = {reason for _, reason in got.values()}
        assert {FinishReason.STOP, FinishReason.LENGTH} <= reasons
    assert preemptions and passes > 30


def test_a_pass_ahead_of_an_answers_end_is_not_used(ahead, asynchronous):
    driver = ahead()
    driver.submit("long", [1, 2], max_tokens=9)
    driver.submit("short", [3, 4], max_tokens=9, logit_bias=((7, 100.0),), min_tokens=4, stop_ids=(7,))
    while driver.answers["short"].last is None:
        driver.step()
    assert asynchronous.log[-2] == ("ahead", 2)
    asynchronous.log.clear()
    driver.step()
    # The other row of that pass is used.
    assert asynchronous.log == [("ahead", 1), "read"]
    driver.finish()
    alone = ahead()
    alone.submit("long", [1, 2], max_tokens=9)
    assert alone.finish()["long"] == driver.answers["long"].tokens


@pytest.mark.parametrize("case", ["prompt", "waiting", "logprobs", "memory"])
def test_no_pass_is_launched_ahead_of(ahead, asynchronous, case):
    config = {"waiting": {"max_sequences": 1}, "prompt": {"max_batch_tokens": 4}, "memory": {"kv_tokens": 32}}.get(case)
    driver = ahead(**(config or {}))
    length = {"memory": 16}.get(case, 2)
    driver.submit("a", [1] * length, max_tokens=9, logprobs=0 if case == "logprobs" else None)
    driver.submit("b", [2] * {"prompt": 99}.get(case, length), max_tokens=2)
    for _ in range(2):
        driver.step()
    assert "read" in asynchronous.log
    assert not any(entry[0] == "ahead" for entry in asynchronous.log)
    driver.finish()


def test_a_row_without_a_valid_token_ends_alone(ahead, asynchronous, monkeypatch):
    driver = ahead()
    for name in ("broken", "whole"):
        driver.submit(name, [1, 2, 3], max_tokens=6)
    driver.step()
    driver.step()
    sequence = driver.engine._scheduler.running[0]
    forward = asynchronous._decoder.forward

    @torch.inference_mode()
    def broken(chunks, *rest):
        logits = forward(chunks, *rest)
        for row, chunk in enumerate(chunks):
            if chunk.block_table is sequence.block_table:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(type(asynchronous._decoder), "forward", lambda self, *args: broken(*args))
    answers = driver.finish()
    assert driver.answers["broken"].last.finish_reason is FinishReason.ERROR
    assert len(answers["whole"]) == 6


def test_a_chunk_is_taken_only_from_a_pass_that_computed_it():
    sequence = RunningSequence(1, "t", None, [5, 6, 7], computed_tokens=2, block_table=array("i", [0]))
    computed = AheadPass({1: (0, Chunk((0,), 2, sequence.block_table, 1))}, torch.zeros(1, 4))
    assert computed.row(ScheduledChunk(1, 2, 1, True), sequence) == 0
    assert computed.row(ScheduledChunk(1, 1, 1, True), sequence) is None
    assert computed.row(ScheduledChunk(1, 2, 2, True), sequence) is None
    assert computed.row(ScheduledChunk(2, 2, 1, True), sequence) is None
    # It was preempted, and has the same blocks by chance.
    sequence.block_table = array("i", [0])
    assert computed.row(ScheduledChunk(1, 2, 1, True), sequence) is None


def test_logits_of_a_pass_and_of_the_other_chunks_are_merged_in_order():
    computed = AheadPass({}, torch.tensor([[0.0], [1.0], [2.0]]))
    rest = torch.tensor([[10.0], [11.0], [12.0]])
    merged = computed.merge([None, 2, None, None, 0], [2, 1, 0, 1, 1], rest)
    assert merged.flatten().tolist() == [10.0, 11.0, 2.0, 12.0, 0.0]
    assert computed.merge([0, 1, 2], [1, 1, 1], None) is computed.logits
    assert computed.merge([2, 0], [1, 1], None).flatten().tolist() == [2.0, 0.0]


def test_blocks_are_allocated_ahead_for_all_or_none():
    scheduler = Scheduler(5, 4, 99, 9)
    for id_ in range(3):
        scheduler.add(RunningSequence(id_, "t", None, [id_, 1, 2, 3], use_prefix_cache=False))
    scheduler.commit(scheduler.schedule(lambda version: True))
    first, second, third = scheduler.sequences
    assert not scheduler.allocate_ahead([first, second, third])
    assert scheduler.free_blocks == 2
    assert scheduler.allocate_ahead([first, second])
    assert scheduler.free_blocks == 0
    # They have their blocks already.
    assert scheduler.allocate_ahead([first, second])
    for id_ in range(3):
        scheduler.get(id_).tokens.append(9)
    scheduler.check_integrity()
    assert scheduler.schedule(lambda version: True).preempted == (2,)
