"""The same work without HTTP: the bare engine and the bare replica."""

from __future__ import annotations

from typing import Any

import pytest

from loramill.settings import ServeSettings
from loramill_bench.http import answers, direct
from loramill_bench.http.direct import DirectTarget
from loramill_bench.http.workload import OUTPUT_TOKENS, Workload


@pytest.mark.parametrize("mix", ["none", "distinct", "zipf"])
def test_the_bare_engine_gives_every_stream_its_answers(published, tiny, tokenizer, uncached, mix: Any) -> None:
    target = DirectTarget(tiny, tuple(published.folders.items()), ServeSettings(max_sequences=8, kv_tokens=2048))
    streams = Workload("tiny", tuple(published.folders), tokenizer, 0).closed_loop(mix, 3, 2, 0)
    models = {request.model for stream in streams for request in stream.requests} - {"tiny"}
    run = direct.run_engine(target, streams)
    assert len(run.served) == len(run.answers) == 6
    assert [len(answer.times) for answer in run.answers] == [OUTPUT_TOKENS] * 6
    assert all(answer.times[-1] == answer.seconds <= run.seconds for answer in run.answers)
    assert direct._engine(target)[0].stats.loads == len(models)
    assert len(direct.run_engine(target, streams).served) == 6
    assert direct._engine(target)[0].stats.loads == len(models)  # it is the same engine


def test_a_stream_asks_the_bare_engine_one_thing_at_a_time(published, tiny, tokenizer, uncached, monkeypatch) -> None:
    target = DirectTarget(tiny, (), ServeSettings(max_sequences=8, kv_tokens=2048))
    most = 0
    step = direct.EngineDriver.step

    def spy(load: Any) -> Any:
        nonlocal most
        outputs = step(load)
        most = max(most, direct._engine(target)[0].stats.running)
        return outputs

    monkeypatch.setattr(direct.EngineDriver, "step", spy)
    direct.run_engine(target, Workload("tiny", (), tokenizer, 0).closed_loop("none", 3, 2, 0))
    assert most == 3


def test_the_bare_engine_has_the_servers_limits(tiny, uncached) -> None:
    target = DirectTarget(tiny, (), ServeSettings(max_sequences=3, kv_tokens=1024, adapter_slots=5, prefix_cache=False))
    config = direct._engine(target)[0]._config
    assert (config.max_sequences, config.kv_tokens, config.adapter_slots) == (3, 1024, 5)
    assert config.max_batch_tokens == 128
    assert not config.prefix_cache


def test_a_bare_replica_gives_all_answers(published, tiny, tokenizer, uncached) -> None:
    target = DirectTarget(tiny, tuple(published.folders.items()), ServeSettings(kv_tokens=2048))
    streams = Workload("tiny", tuple(published.folders), tokenizer, 0).closed_loop("distinct", 3, 2, 0)
    run = direct.run_replica(target, streams)
    assert len(run.served) == len(run.answers) == 6
    assert answers.output_rate(run) == 6 * OUTPUT_TOKENS / run.seconds
    stats = direct._offline(target, 3)._replica.stats()
    assert stats.loads == 3
