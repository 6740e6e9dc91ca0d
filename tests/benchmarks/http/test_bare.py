"""The same work without HTTP: the bare engine and the bare replica."""

from __future__ import annotations

from typing import Any

import pytest

from loramill.settings import ServeSettings
from loramill_bench.http import answers, bare
from loramill_bench.http.bare import Bare
from loramill_bench.http.work import NEW, Desk


@pytest.mark.parametrize("mix", ["none", "distinct", "zipf"])
def test_the_bare_engine_gives_every_stream_its_answers(there, tiny, tokenizer, uncached, mix: Any) -> None:
    here = Bare(tiny, tuple(there.folders.items()), ServeSettings(max_sequences=8, kv_tokens=2048))
    streams = Desk("tiny", tuple(there.folders), tokenizer, 0).closed(mix, 3, 2, 0)
    models = {ask.model for stream in streams for ask in stream.asks} - {"tiny"}
    run = bare.engine(here, streams)
    assert len(run.served) == len(run.answers) == 6
    assert [len(answer.times) for answer in run.answers] == [NEW] * 6
    assert all(answer.times[-1] == answer.seconds <= run.seconds for answer in run.answers)
    assert bare._engine(here)[0].stats.loads == len(models)
    assert len(bare.engine(here, streams).served) == 6
    assert bare._engine(here)[0].stats.loads == len(models)  # it is the same engine


def test_a_stream_asks_the_bare_engine_one_thing_at_a_time(there, tiny, tokenizer, uncached, monkeypatch) -> None:
    here = Bare(tiny, (), ServeSettings(max_sequences=8, kv_tokens=2048))
    most = 0
    step = bare.Load.step

    def spy(load: Any) -> Any:
        nonlocal most
        outputs = step(load)
        most = max(most, bare._engine(here)[0].stats.running)
        return outputs

    monkeypatch.setattr(bare.Load, "step", spy)
    bare.engine(here, Desk("tiny", (), tokenizer, 0).closed("none", 3, 2, 0))
    assert most == 3


def test_the_bare_engine_has_the_servers_limits(tiny, uncached) -> None:
    here = Bare(tiny, (), ServeSettings(max_sequences=3, kv_tokens=1024, adapter_slots=5, prefix_cache=False))
    config = bare._engine(here)[0]._config
    assert (config.max_sequences, config.kv_tokens, config.adapter_slots) == (3, 1024, 5)
    assert config.max_batch_tokens == 128
    assert not config.prefix_cache


def test_a_bare_replica_gives_all_answers(there, tiny, tokenizer, uncached) -> None:
    here = Bare(tiny, tuple(there.folders.items()), ServeSettings(kv_tokens=2048))
    streams = Desk("tiny", tuple(there.folders), tokenizer, 0).closed("distinct", 3, 2, 0)
    run = bare.offline(here, streams)
    assert len(run.served) == len(run.answers) == 6
    assert answers.rate(run) == 6 * NEW / run.seconds
    stats = bare._offline(here, 3)._replica.stats()
    assert stats.loads == 3
