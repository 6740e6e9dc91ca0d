"""The engine's benchmark runs end to end, compares equal computations, and reports its medians."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from loramill.errors import EngineFault, InvalidRequest, ModelNotFound
from loramill.models.catalog import Base
from loramill.pipelines.compare.timing import Effort
from loramill.serve.engine import EngineConfig
from loramill.serve.model import load_decoder
from loramill.serve.model.graphs import GraphedDecoder
from loramill_bench import engine as bench
from loramill_bench.engine import (
    cold_adapters,
    continuous_batching,
    driver,
    host_time,
    idle,
    limits,
    memory,
    peft,
    prefill,
    shapes,
    zipf,
)
from loramill_bench.engine import harness as harnesses
from loramill_bench.engine.driver import EngineDriver, decoding_engine
from loramill_bench.engine.harness import Harness, write_adapters
from loramill_bench.kernels import linear
from loramill_bench.kernels.linear import Product
from loramill_bench.results import Result

VOCABULARY = 101

#: The required targets, by case.
TARGETS = {
    "peft 8/8: PEFT's step over ours": ">= 10",
    "peft 32/32: PEFT's step over ours": ">= 10",
    "peft 8/1: PEFT's step over ours": ">= 7",
    "peft 32/1: PEFT's step over ours": ">= 4",
    "generate 64/8/64: transformers over ours": ">= 3",
    "generate 64/32/64: transformers over ours": ">= 3",
    "generate 384/16/32: transformers over ours": ">= 3",
    "step 1x64: engine": "<= 1.25",
    "step 32x64: engine": "<= 1.5",
    "step 1x512: engine": "<= 1.25",
    "step 32x512: engine": "<= 1.5",
    "idle adapters 1: added": "<= 0.01",
    "idle adapters 32: added": "<= 0.01",
    "host time 32: step": "<= 0.4",
    "host time 128: step": "<= 1",
    "zipf 500: speed": ">= 0.9",
    "zipf 500: resident memory": "<= 1.2",
    "cold under load 8: p99 gap": "<= 1.15",
    "cold under load 32: p99 gap": "<= 1.15",
    "first token: cold": "<= 1.3",
}


@pytest.fixture(scope="module")
def base(tiny_base) -> Base:
    return tiny_base


@pytest.fixture(scope="module")
def harness(base, tmp_path_factory) -> Harness:
    """The tiny base with four strong adapters: they change the tokens."""
    decoder = load_decoder(base.folder, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harnesses, "_WEIGHT_STD", 0.3)
        return Harness(base, decoder, write_adapters(decoder, tmp_path_factory.mktemp("adapters"), 4))


def give_times(monkeypatch: pytest.MonkeyPatch, module: object, times: Mapping[str, float]) -> list[Effort]:
    """Makes a module's variants take the given times, and checks their names; returns the efforts."""
    efforts = []

    def fake(
        variants: Mapping[str, Callable[[], object]], effort: Effort, clock: Callable[[], float] = time.thread_time
    ) -> Mapping[str, float]:
        assert variants.keys() == times.keys()
        for variant in variants.values():
            variant()
        efforts.append(effort)
        return times

    monkeypatch.setattr(module, "interleaved", fake)
    return efforts


def values(results: list[Result]) -> dict[str, float]:
    return {result.case: result.value for result in results}


def test_every_case_runs_and_has_its_target(base, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer sequences, tokens, requests and adapters under the same names."""

    def smaller(case: object, **less: int) -> SimpleNamespace:
        return SimpleNamespace(
            **{**{field.name: getattr(case, field.name) for field in fields(case)}, **less}, name=case.name
        )

    monkeypatch.setattr(
        peft, "CASES", tuple(smaller(case, batch=4, adapters=case.adapters // 8 or 1) for case in peft.CASES)
    )
    monkeypatch.setattr(bench, "_ADAPTERS", 4)
    monkeypatch.setattr(
        continuous_batching,
        "CASES",
        tuple(smaller(case, prompt=case.prompt // 16, new=2) for case in continuous_batching.CASES),
    )
    monkeypatch.setattr(linear, "SQUARES", (32,))
    monkeypatch.setattr(zipf, "CASES", tuple(replace(case, requests=8, new=2) for case in zipf.CASES))
    monkeypatch.setattr(cold_adapters, "_PASS_STEPS", 12)
    reported = []
    results = bench.run(base, report=reported.append, rounds=1)
    cases = [result.case for result in results]
    assert len(cases) == len(set(cases))
    assert all(any(case.startswith(f"{group}: ") for group in reported) for case in cases)
    assert {result.case: result.target_text for result in results if result.target is not None} == TARGETS
    assert all(math.isfinite(result.value) for result in results)
    assert all(result.value > 0 for result in results if not result.case.endswith("added"))


def test_run_measures_only_the_selected_case_and_leaves_no_files(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    results = bench.run(base, "prefill", rounds=1)
    assert [result.case for result in results] == ["prefill 512: base", "prefill 512: one adapter"]
    with pytest.raises(InvalidRequest, match=r"'nothing'.*peft 8/8.*zipf 500.*prefill 512"):
        bench.run(base, "nothing", rounds=1)
    assert list(tmp_path.iterdir()) == []


def test_peft_and_the_engine_run_the_same_adapters(harness) -> None:
    """PEFT must find the engine's first token as likely as its own, up to bfloat16, and no other adapter's."""
    owners = ["0", "1", "1", "3"]
    requests = harness.requests(owners, 12, 1)
    got = {}
    with harness.engine(EngineConfig(kv_tokens=256)) as engine:
        load = EngineDriver(engine)
        load.submit(requests)
        while load.open:
            got.update((output.request_id, output.tokens[0]) for output in load.step())
    prompts = torch.tensor([request.tokens for request in requests])
    tokens = torch.tensor([[got[request.id]] for request in requests])

    def shortfall(names: list[str]) -> torch.Tensor:
        with torch.inference_mode():
            logits = harness.peft_model(input_ids=prompts, adapter_names=names).logits[:, -1].float()
        return logits.max(-1).values - logits.gather(1, tokens)[:, 0]

    assert shortfall(owners).max() < 0.3
    assert shortfall(["1", "0", "0", "2"]).max() > 1


def test_peft_reports_its_medians(harness, monkeypatch) -> None:
    efforts = give_times(monkeypatch, peft, {"ours": 0.5, "PEFT": 4.5})
    results = peft.measure(harness, peft.PeftStep(4, 2, 10), rounds=24)
    assert values(results) == {"peft 4/2: PEFT's step over ours": 9.0, "peft 4/2: decode": 8.0}
    assert [result.met for result in results] == [False, None]
    assert efforts == [Effort(0, 8)]


def test_generation_reports_its_medians(harness, monkeypatch) -> None:
    efforts = give_times(monkeypatch, continuous_batching, {"ours": 0.5, "theirs": 1.0})
    results = continuous_batching.measure(harness, continuous_batching.Generation(20, 2, 3), rounds=24)
    assert values(results) == {
        "generate 20/2/3: transformers over ours": 2.0,
        "generate 20/2/3: output throughput": 12.0,
        "generate 20/2/3: transformers' output throughput": 6.0,
    }
    assert efforts == [Effort(0, 1)]


@pytest.mark.parametrize(("read", "operations", "limit"), [(0.5, 100, 0.5), (0.5, 1, 2.0)])
def test_the_higher_limit_counts(harness, monkeypatch, read, operations, limit) -> None:
    """A product with the operations of one step, or of a hundred, takes 2 seconds."""
    point = limits.DecodeStep(2, 16, 1.5)
    row = limits._operations(harness.decoder, 2, 20)
    monkeypatch.setattr(limits.linear, "peak_candidates", lambda *_: {"mm": Product(lambda: None, operations * row)})
    give_times(monkeypatch, limits, {"step": 3.0, "forward": 2.5, "read": read, "mm": 2.0})
    found = values(limits.measure(harness, point, rounds=16))
    assert found == {
        "step 2x16: engine": 3 / limit,
        "step 2x16: forward": 2.5 / limit,
        "step 2x16: decode": 2 / 3,
    }


def test_a_step_reads_all_weights_and_the_cache_and_computes_with_them(base, harness) -> None:
    model = LlamaForCausalLM.from_pretrained(base.folder)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert shapes.weight_count(harness.decoder) == weights  # the embedding is the head
    cache = LlamaForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)(
        torch.ones(3, 7, dtype=torch.long)
    ).past_key_values
    size = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert shapes.kv_bytes(harness.decoder) * 3 * 7 == size
    assert limits._bytes_read(harness.decoder, 3, 7) == 2 * weights + size
    attention = 2 * 2 * 7 * 32  # layers; scores and sums; keys; width of all heads
    assert limits._operations(harness.decoder, 3, 7) == 2 * 3 * (weights + attention)


def test_the_forward_pass_alone_attends_over_a_written_cache(harness, monkeypatch) -> None:
    caches = []
    new_cache = harness.decoder.new_cache
    monkeypatch.setattr(harness.decoder, "new_cache", lambda *sizes: caches.append(new_cache(*sizes)) or caches[-1])
    logits = limits._forward(harness.decoder, 3, 20)()
    assert logits.shape == (3, VOCABULARY)
    assert logits.isfinite().all()
    assert all(part.count_nonzero() > 0.9 * part.numel() for kv in caches[0] for part in (kv.keys, kv.values))


@pytest.mark.parametrize("versions", [[None, None, None], ["0", "3", "0"]])
def test_decoding_gives_one_token_per_sequence_and_step(harness, versions, monkeypatch) -> None:
    forward, starts = harness.decoder.forward, []

    def spy(chunks, *rest):
        starts.append({chunk.start for chunk in chunks})
        return forward(chunks, *rest)

    monkeypatch.setattr(harness.decoder, "forward", spy)
    with decoding_engine(harness, versions, context=40, steps=6, resident=["2"]) as engine:
        assert set(engine.stats.resident) == {"2", *filter(None, versions)}
        starts.clear()
        for _ in range(6):
            outputs = engine.step()
            assert len(outputs) == 3
            assert all(len(output.tokens) == 1 and output.finish_reason is None for output in outputs)
        assert starts == [{position} for position in range(40, 46)]
        assert engine.stats.running == 3
        assert engine.stats.preemptions == 0


def test_idle_adapters_are_resident_in_one_of_the_engines(harness, monkeypatch) -> None:
    engines = []

    def spy(harness, versions, context, steps, resident=(), **limits):
        engines.append((versions, list(resident), limits))
        return decoding_engine(harness, versions, context, steps, resident, **limits)

    monkeypatch.setattr(idle, "decoding_engine", spy)
    give_times(monkeypatch, idle, {"bare": 1.0, "enabled": 1.25})
    found = values(idle.measure(harness, idle.IdleAdapters(2), rounds=1))
    assert found == {"idle adapters 2: added": 0.25, "idle adapters 2: decode": 1.6}
    assert engines == [
        ([None, None], [], {"adapter_slots": 1, "adapter_bytes": 1}),
        ([None, None], [str(version) for version in range(8)], {}),
    ]


def test_the_hosts_time_is_that_of_passes_ahead_from_graphs(harness, monkeypatch) -> None:
    """Each step launches one pass, of all sequences, and copies one paging; the adapters' tiles stay the same."""
    forward, passes = GraphedDecoder.forward, []

    def spy(model, chunks, cache, slab, batch, tokens=None):
        passes.append((len(chunks), tokens is not None, len(batch.runs)))
        return forward(model, chunks, cache, slab, batch, tokens)

    monkeypatch.setattr(GraphedDecoder, "forward", spy)
    (result,) = host_time.measure(harness, host_time.HostTime(6), rounds=1)
    assert result.value > 0
    assert passes[-25:] == [(6, True, 4)] * 25


def test_zipf_requests_more_adapters_than_there_are_slots() -> None:
    (traffic,) = zipf.CASES
    versions = zipf.draw_versions(traffic)
    assert versions == zipf.draw_versions(traffic)
    assert len(set(versions)) > 3 * traffic.slots
    counts = Counter(zipf.draw_versions(replace(traffic, requests=100_000)))
    assert [counts[str(rank)] / counts["0"] for rank in (1, 4, 9)] == pytest.approx([1 / 2, 1 / 5, 1 / 10], rel=0.1)


def test_zipf_runs_all_requests_and_samples_memory_each_step(harness, monkeypatch) -> None:
    traffic = zipf.ZipfRequests(versions=9, requests=20, prompt=5, new=3, sequences=8, slots=2)
    sizes = itertools.count(1000, 10)
    monkeypatch.setattr(zipf, "resident_bytes", lambda: next(sizes))
    one, many, share = zipf._measure(harness.base, harness.adapters, traffic)
    assert min(one.cpu, one.wall, many.cpu, many.wall) > 0
    # Each of the four runs has at least one step per token of an answer and one for the first prompt.
    samples = share * zipf._configured_bytes(harness.decoder, zipf._config(harness, traffic)) / 10
    assert samples > 4 * 3 * 20 / 8


def test_memory_that_cannot_be_read_is_left_out(harness, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATM", tmp_path / "nothing")
    traffic = zipf.ZipfRequests(versions=2, requests=2, prompt=3, new=2, sequences=2, slots=2)
    *_, share = zipf._measure(harness.base, harness.adapters, traffic)
    assert share is None


def test_arrivals_are_cold_and_gaps_are_between_steps(harness, monkeypatch) -> None:
    monkeypatch.setattr(cold_adapters, "_PASS_STEPS", 25)
    arrived = []
    with Harness(harness.base, harness.decoder, harness.adapters).engine(EngineConfig(kv_tokens=2048)) as engine:
        load = EngineDriver(engine)
        case = cold_adapters.ColdUnderLoad(3)
        without_arrivals = case._gaps(harness, load, None)
        assert engine.stats.loads == 1
        with_arrivals = case._gaps(harness, load, (arrived.append(n) or str(n) for n in itertools.count(1)))
        assert arrived == [1, 2, 3]
        assert engine.stats.loads == 4
    for gaps in (without_arrivals, with_arrivals):
        assert len(gaps) in (25, 26)
        assert min(gaps) > 0


def test_the_first_token_is_of_a_cold_adapter_each_time(harness, monkeypatch) -> None:
    read = []
    source = harness.source
    spied = replace(harness)
    object.__setattr__(spied, "source", lambda version: read.append(version) or source(version))
    cold_adapters.measure(spied, cold_adapters.ColdFirstToken(), rounds=5)
    assert read.count("0") == 1
    assert len(read) == len(set(read)) == 1 + 6


def test_first_token_reports_its_medians(harness, monkeypatch) -> None:
    give_times(monkeypatch, cold_adapters, {"cold": 0.5, "warm": 0.25, "read": 0.15})
    results = cold_adapters.measure(harness, cold_adapters.ColdFirstToken(), rounds=1)
    assert [result.value for result in results] == pytest.approx([1.25, 500, 250, 150])
    assert results[0].met


def test_prefill_computes_the_whole_prompt(harness, monkeypatch) -> None:
    give_times(monkeypatch, prefill, {"base": 2.0, "one adapter": 4.0})
    results = prefill.measure(harness, prefill.Prefill(64), rounds=1)
    assert [result.value for result in results] == [32.0, 16.0]


def test_a_requests_error_ends_the_measurement(harness) -> None:
    def missing(version: str) -> Path:
        raise ModelNotFound(f"no version {version}")

    broken = replace(harness)
    object.__setattr__(broken, "source", missing)
    with broken.engine(EngineConfig(kv_tokens=64)) as engine, pytest.raises(ModelNotFound, match="no version 7"):
        EngineDriver(engine).run(harness.requests(["7"], 3, 1))


def test_an_engine_that_does_nothing_is_an_error(harness, monkeypatch) -> None:
    monkeypatch.setattr(driver, "_TIMEOUT_SECONDS", 0.01)
    with harness.engine(EngineConfig(kv_tokens=64)) as engine, pytest.raises(EngineFault, match="0 requests are open"):
        EngineDriver(engine).step()
