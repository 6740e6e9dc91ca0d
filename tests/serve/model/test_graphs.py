"""Decodes in graphs against the decoder on its own: with simulated graphs here, and with real ones on a GPU.

`TRITON_INTERPRET=1 pytest tests/serve/model/graphs_interpreted.py` runs the tests with the Triton kernels one by one.
"""

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loramill.errors import BaseUnusable, EngineFault, SetupError
from loramill.gpus import FP8_CAPABILITY
from loramill.kernels import Batch, Delta, torch_backend
from loramill.serve.engine import Engine, EngineConfig, Request, SamplingParams
from loramill.serve.engine.durations import Durations
from loramill.serve.model import Chunk, load_decoder, load_model, loading
from loramill.serve.model.graphs import GraphedDecoder

from .graphed import BLOCK, Recorder, Session, statics, write_base

ROWS, RANKS = (1, 2, 4, 6), (0, 4, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def decoder(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "backend", lambda *_: torch_backend)
        return load_decoder(folder, dtype=torch.float32)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def graphed(decoder, recorder):
    return GraphedDecoder(decoder, rows=ROWS, ranks=RANKS, capture=recorder, buffers=statics())


@pytest.fixture
def session(graphed, decoder):
    session = Session(graphed, decoder)
    for adapter_id, rank in enumerate((3, 4, 16)):
        session.load(adapter_id, rank)
    return session


def test_sequences_that_start_grow_and_end(session, recorder):
    draw, alive = session.random, []
    for step in range(25):
        while len(alive) < draw.randint(1, 6):
            alive.append(session.begin(draw.randint(1, 40), draw.choice([None, 0, 1, 2])))
        chosen = draw.sample(alive, draw.randint(1, len(alive)))
        session.decode(chosen)
        for sequence in [s for s in alive if draw.random() < 0.1]:
            alive.remove(sequence)
            session.end(sequence)
        if step % 9 == 8:
            # Another adapter in a slot that graphs have used.
            session.load(draw.randrange(3), draw.choice([1, 4, 9, 16]), seed=step)
    assert len(recorder.replayed) == 25
    assert len(recorder.recorded) <= len(ROWS) * len(RANKS)
    assert set(recorder.recorded) == set(ROWS)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6), (7, None)])
def test_a_step_takes_the_smallest_graph_that_holds_its_rows(session, recorder, count, rows):
    sequences = [session.begin(1 + index, None) for index in range(count)]
    recorder.replayed.clear()
    for _ in range(3):
        session.decode(sequences)
    assert recorder.replayed == ([] if rows is None else [rows] * 3)
    assert recorder.recorded.count(rows) == (rows is not None)


def test_the_largest_rank_of_a_step_selects_the_graph(session, recorder, graphed):
    session.load(3, 17)
    sequences = [session.begin(5, adapter_id) for adapter_id in (None, 0, 1, 2, 3)]
    expected = {(0,): 0, (0, 1): 4, (2,): 4, (1, 2, 0): 4, (3, 1): 16, (4,): None, (4, 0): None}
    for chosen, rank in expected.items():
        graphed.new_cache(1, BLOCK)  # drops the graphs
        recorder.recorded.clear()
        session.decode([sequences[index] for index in chosen])
        assert [key[1] for key in graphed._graphs] == ([] if rank is None else [rank])
    # The slot's next adapter is larger, and the step too large for a graph.
    recorder.replayed.clear()
    session.decode([sequences[1]])
    session.load(0, 20)
    session.decode([sequences[1]])
    assert len(recorder.replayed) == 1


def test_only_steps_of_single_wanted_tokens_are_replayed(session, recorder):
    one, two = session.begin(9, 0), session.begin(12, None)
    recorder.replayed.clear()
    one.tokens.append(1)
    for count, wanted in ((1, 0), (2, 1), (2, 2)):
        session.check([session.chunk(two, 11, 1), session.chunk(one, 8, count, wanted)], [None, 0])
    assert not recorder.replayed
    session.check([session.chunk(two, 11, 1), session.chunk(one, 9, 1)], [None, 0])
    assert recorder.replayed == [2]


def test_unused_rows_write_only_to_the_scratch_block(session, graphed):
    sequences = [session.begin(20 + index, adapter_id) for index, adapter_id in enumerate((None, 0, 2))]
    side = session.sides[0]
    before = [part.clone() for kv in side.cache for part in (kv.keys, kv.values)]
    session.decode(sequences)
    written = {s.blocks[(len(s.tokens) - 2) // BLOCK] for s in sequences}
    for old, new in zip(before, [part for kv in side.cache for part in (kv.keys, kv.values)], strict=True):
        changed = (old != new) & ~(old.isnan() & new.isnan())
        assert set(changed.nonzero()[:, 0].tolist()) - {40} == written
        assert len(new) == 41
    assert not {40} & {block for s in sequences for block in s.blocks}


def test_stale_values_in_unused_rows_have_no_effect(session, graphed):
    """NaN in a row of an earlier step, or in the scratch block, reaches no row."""
    sequences = [session.begin(8 + index, adapter_id) for index, adapter_id in enumerate((None, 0, 1, 2))]
    session.decode(sequences)
    with torch.inference_mode():
        for graph in graphed._graphs.values():
            graph.x.fill_(torch.nan)
        for kv in session.sides[0].cache:
            kv.keys[40] = torch.nan
            kv.values[40] = torch.nan
    session.decode(sequences[:3])


def test_logits_outlive_the_next_step(session, graphed):
    side = session.sides[0]
    first = side.forward([Chunk([3], 0, [1], 1)], [None])
    kept = first.clone()
    side.forward([Chunk([4], 0, [1], 1)], [None])
    assert torch.equal(first, kept)


def test_tokens_on_the_device_replace_those_of_the_chunks(session, graphed, decoder, recorder):
    tokens, owners = [3, 5], [None, 0]
    due = session.check([Chunk([token], 0, [block], 1) for block, token in enumerate(tokens)], owners)
    recorder.replayed.clear()
    for side, model in zip(session.sides, (graphed, decoder), strict=True):
        chunks = [Chunk([0], 0, [block], 1) for block in range(2)]
        batch = Batch.of([(None, 1), (side.slots[0], 1)])
        got = model.forward(chunks, side.cache, side.slab, batch, torch.tensor(tokens))
        assert torch.allclose(got, due, rtol=0, atol=1e-4)
    assert recorder.replayed == [2]


def test_graphs_are_dropped_with_their_cache_and_slab(graphed, decoder, recorder):
    session = Session(graphed, decoder)
    session.load(0, 4)
    session.decode([session.begin(5, 0)])
    keys, slab = weakref.ref(session.sides[0].cache[0].keys), weakref.ref(session.sides[0].slab)
    session = fresh = Session(graphed, decoder)
    gc.collect()
    fresh.load(0, 4)
    fresh.decode([fresh.begin(7, 0)])
    assert keys() is None
    assert slab() is None
    assert len(recorder.recorded) == 2
    # A new slab alone drops the graphs, too.
    other = fresh.sides[0].slab = graphed.new_slab(2, 1 << 20)
    assert other is not slab
    fresh.sides[0].slots.clear()
    fresh.load(0, 4, seed=1)
    fresh.decode([fresh.begin(7, 0)])
    assert len(recorder.recorded) == 3


def test_a_stale_handle_is_an_error(session, graphed):
    sequence = session.begin(6, 0)
    session.decode([sequence])
    side = session.sides[0]
    stale = Batch.of([(side.slots[0], 1)])
    session.load(0, 4, seed=5)
    for wanted in (0, 1):
        with pytest.raises(EngineFault, match="freed meanwhile"):
            graphed.forward([Chunk([1], 6, sequence.blocks, wanted)], side.cache, side.slab, stale)


def test_the_scratch_block_has_no_owner(session):
    with pytest.raises(EngineFault, match="paging has"):
        session.sides[0].forward([Chunk([1], 0, [40], 1)], [None])


def answers(model, config):
    """An engine's greedy answers to some prompts, and its statistics."""
    engine = Engine(model, lambda version: pytest.fail(f"{version} was requested"), config)
    prompts = {f"{size}": tuple(range(size, 2 * size)) for size in (1, 5, 16, 17, 30)}
    for name, prompt in prompts.items():
        engine.submit(Request(name, "acme", prompt, SamplingParams(temperature=0.0, max_tokens=20)))
    tokens = dict.fromkeys(prompts, ())
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.tokens
    engine.check_integrity()
    stats = replace(engine.stats, queue_times=Durations(), step_times=Durations(), load_times=Durations())
    engine.close()
    return tokens, stats


def test_an_engine_gives_the_same_answers(graphed, decoder, recorder):
    # Little memory: sequences are preempted and recomputed, and blocks change owners.
    config = EngineConfig(kv_tokens=128, max_batch_tokens=24)
    got, stats = answers(graphed, config)
    assert (got, stats) == answers(decoder, config)
    assert stats.preemptions > 0
    assert all(len(tokens) == 20 for tokens in got.values())
    assert len(recorder.replayed) > stats.steps / 2


def test_everything_else_is_delegated_to_the_decoder(graphed, decoder):
    for name in ("vocabulary", "context_length", "dtype", "sites"):
        assert getattr(graphed, name) == getattr(decoder, name)
    module = "model.layers.1.self_attn.k_proj"
    assert torch.equal(graphed.target_weight(module), decoder.target_weight(module))
    assert graphed.target_weight("nonsense") is None
    assert graphed.new_slab(3, 1 << 16, bits=8).dtype == torch.int8


def test_the_same_over_the_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    tests = str(Path(__file__).with_name("graphs_interpreted.py"))
    done = subprocess.run([*command, tests], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_an_error(folder):
    with pytest.raises(SetupError, match="no CUDA device"):
        load_model(folder, dtype=torch.float32, device="cuda")


def test_a_base_that_the_decoder_does_not_support_is_refused_on_a_gpu(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["CohereForCausalLM"]}')
    with pytest.raises(BaseUnusable, match=r"CohereForCausalLM.* on the CPU alone"):
        load_model(tmp_path, dtype=torch.float32, device="cuda")


#: Relative errors of logits: float32 in other orders of sums, and bfloat16's rounding over two layers.
ON_GPU = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ON_GPU, ids=str)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_on_a_gpu_the_logits_are_those_of_the_cpu(folder, graphs, dtype):
    pytest.importorskip("triton")
    load = load_model if graphs else load_decoder
    on_gpu, on_cpu = load(folder, dtype=dtype, device="cuda"), load_decoder(folder, dtype=torch.float32)
    assert isinstance(on_gpu, GraphedDecoder) == graphs
    session = Session(on_gpu, on_cpu, tolerance=ON_GPU[dtype])
    for adapter_id, rank in enumerate((3, 16, 64)):
        session.load(adapter_id, rank)
    sequences = [session.begin(3 + 9 * index, adapter_id) for index, adapter_id in enumerate((None, 0, 1, 2, 0))]
    for count in (5, 3, 1, 5, 2, 4):
        session.decode(sequences[:count])
    session.load(1, 8, seed=9)
    session.decode(sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp8"])
def test_on_a_gpu_a_replayed_step_is_the_eager_one_and_waits_for_nothing(folder, quantization):
    pytest.importorskip("triton")
    if quantization == "fp8" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("this GPU does not compute in float8")
    decoder = load_decoder(folder, dtype=torch.bfloat16, quantization=quantization, device="cuda")
    session = Session(GraphedDecoder(decoder), decoder, tolerance=2e-2)
    session.load(0, 16)
    sequences = [session.begin(5 + index, adapter_id) for index, adapter_id in enumerate((None, 0, 0))]
    session.decode(sequences)
    chunks = [session.chunk(sequence, len(sequence.tokens) - 1, 1) for sequence in sequences]
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.sides[0].forward(chunks, [None, 0, 0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_largest_rank_is_that_of_the_current_slab(tmp_path):
    write_base(tmp_path)
    graphed = GraphedDecoder(
        load_decoder(tmp_path, dtype=torch.float32), capture=lambda run: run, buffers=SimpleNamespace()
    )
    module, d_in, width = next(
        (site.modules[0], site.d_in, site.widths[0]) for site in graphed.sites if not site.lookup
    )
    found = []
    for rank in (4, 12):
        slab = graphed.new_slab(1, 1 << 20)
        packed = slab.pack({module: Delta(torch.ones(rank, d_in), torch.ones(width, rank))})
        slot = slab.allocate(packed.bytes)
        slab.load(slot, packed)
        found.append((slab.changes, graphed._largest_rank(slab, Batch.of([(slot, 1)]))))
    assert found == [(1, 4), (1, 12)]
