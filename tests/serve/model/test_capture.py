"""Graphs that are captured before the first request, and those that can't be captured."""

from contextlib import contextmanager

import pytest
import torch

from loramill.kernels import torch_backend
from loramill.kernels.adapters.packing import RANK
from loramill.serve.engine import Engine, EngineConfig
from loramill.serve.engine.sampling.device_sampler import DeviceSampler
from loramill.serve.model import Decoder, graphs, load_decoder, loading
from loramill.serve.model.graphs import CudaCapture, GraphedDecoder

from .graphed import BLOCK, Recorder, Session, statics, write_base


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "backend", lambda *_: torch_backend)
        return load_decoder(folder, dtype=torch.float32)


class Failing(Recorder):
    """Fails to capture some numbers of rows."""

    def __init__(self, *rows):
        super().__init__()
        self.failing = rows

    def __call__(self, run):
        if len(run()) in self.failing:
            raise torch.OutOfMemoryError("no memory for a graph")
        return super().__call__(run)


def test_decodes_whose_graph_cannot_be_captured_run_without_one(decoder, caplog):
    graphed = GraphedDecoder(decoder, rows=(1, 2, 4), ranks=(0, 4), capture=Failing(2), buffers=statics())
    session = Session(graphed, decoder)
    session.load(0, 4)
    sequences = [session.begin(5 + index, adapter) for index, adapter in enumerate((None, 0, None))]
    for _ in range(3):
        for count in (1, 2, 3):
            session.decode(sequences[:count])
    assert graphed.failed_captures == 1
    assert sorted(graphed._capture.recorded) == [1, 4]
    # Logged once, with the cause.
    causes = [record.exc_info[1] for record in caplog.records if "no CUDA graph" in record.message]
    assert [type(cause) for cause in causes] == [torch.OutOfMemoryError]


def test_a_device_that_failed_is_no_failed_capture(decoder, monkeypatch):
    graphed = GraphedDecoder(decoder, rows=(1,), ranks=(0,), capture=Failing(1), buffers=statics())
    monkeypatch.setattr(graphs, "device_works", lambda device: False)
    session = Session(graphed, decoder)
    with pytest.raises(torch.OutOfMemoryError):
        session.decode([session.begin(3, None)])
    assert graphed.failed_captures == 0


class OnDevice(Decoder):
    """A decoder that the engine takes for one on a GPU."""

    asynchronous = True


@pytest.fixture
def warm(decoder, monkeypatch):
    """Warms up an engine over graphs; returns the engine, its graphs and the order of what was run."""
    log = []
    made = []

    def make(capture=None, ranks=(3, 16), **config):
        buffers = statics()
        recorder = Recorder() if capture is None else capture
        on_device = object.__new__(OnDevice)
        on_device.__dict__ |= vars(decoder)
        graphed = GraphedDecoder(on_device, rows=(1, 2, 4, 6), ranks=(0, 4, 16), capture=recorder, buffers=buffers)
        layers = Decoder.layers

        def logged(self, x, cache, pages, slab, batch):
            log.append(("compile" if buffers.compiling else "run", len(x), int(slab.table[..., RANK].max())))
            return layers(self, x, cache, pages, slab, batch)

        monkeypatch.setattr(Decoder, "layers", logged)
        config = EngineConfig(**{"kv_tokens": 20 * BLOCK, "max_batch_tokens": 70, "max_sequences": 5, **config})
        made.append(Engine(graphed, lambda version: pytest.fail("nothing is loaded"), config))
        made[-1].warm_up(ranks)
        return made[-1], graphed, log

    yield make
    for engine in made:
        engine.close()


def test_an_engine_on_a_gpu_is_warm_for_all_numbers_of_decodes_and_ranks(warm):
    engine, graphed, log = warm()
    assert set(graphed._graphs) == {(rows, rank) for rows in (1, 2, 4, 6) for rank in (0, 4, 16)}
    assert None not in graphed._graphs.values()
    # Everything is compiled before anything is captured, and the largest graph of a rank comes first.
    kinds = [kind for kind, *_ in log]
    assert kinds == sorted(kinds)
    assert {rank for _, _, rank in log} == {0, 3, 16}
    assert graphed._capture.recorded == [6, 4, 2, 1] * 3
    # Prompts of several lengths, alone and with a decode.
    assert {70, 64, 16, 2, 17} <= {rows for kind, rows, _ in log if kind == "run"}
    slab = engine._adapters.slab
    assert slab.bytes == 0 and not slab.table[..., RANK].any()
    engine.check_integrity()


def test_ranks_for_which_a_slab_has_no_room_are_left_out(warm):
    _, graphed, _ = warm(ranks=(16,), adapter_bytes=64)
    assert {rank for _, rank in graphed._graphs} == {0}


def test_failed_captures_are_in_the_engines_statistics(warm):
    engine, _, _ = warm(capture=Failing(4), ranks=(3,))
    engine.step()
    assert engine.stats.failed_captures == 2


def test_the_device_sampler_is_warm(warm, monkeypatch):
    sampled = []
    sample = DeviceSampler.sample

    def logged(self, logits, samplers):
        sampled.append((len(samplers), samplers[0].params.top_p, samplers[0].mask is not None))
        return sample(self, logits, samplers)

    monkeypatch.setattr(DeviceSampler, "sample", logged)
    engine, _, _ = warm(ranks=())
    assert sampled == [(5, 1.0, False), (5, 1.0, False), (5, 0.9, True)]
    assert engine._runner._device_sampler is not None
    assert len(engine._runner._device_sampler._shifts._amounts) >= 5


def test_a_failed_capture_leaves_the_callers_stream_current_and_its_pool_behind(monkeypatch):
    """`torch.cuda.graph` does not restore the stream if the capture can't be ended, and does not end its pool's use."""

    class Stream:
        def wait_stream(self, other):
            pass

    engines = Stream()
    current = [engines]

    @contextmanager
    def on(stream):
        before, current[0] = current[0], stream
        yield
        current[0] = before

    in_use = set()

    class Graph:
        def __init__(self, graph, *, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            self.pool, self.stream = pool, stream

        def __enter__(self):
            assert self.pool not in in_use, "beginAllocateToPool: already recording to mempool_id"
            in_use.add(self.pool)
            current[0] = self.stream

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    def end_use(device, pool):
        if pool not in in_use:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        in_use.remove(pool)

    fakes = {
        "Stream": Stream,
        "stream": on,
        "graph": Graph,
        "CUDAGraph": object,
        "graph_pool_handle": iter(range(9)).__next__,
        "current_device": lambda: 0,
        "current_stream": lambda: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_use, raising=False)
    capture = CudaCapture()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="previous error"):
            capture(lambda: torch.zeros(1))
        assert current[0] is engines and not in_use
    assert capture._pool == 2


@pytest.mark.gpu
def test_on_a_gpu_a_failed_capture_harms_no_later_step(tmp_path):
    decoder = load_decoder(write_base(tmp_path), dtype=torch.bfloat16, device="cuda")
    graphed = GraphedDecoder(decoder)
    layers, fail = decoder.layers, [True]

    def failing(*arguments):
        h = layers(*arguments)
        if torch.cuda.is_current_stream_capturing() and fail:
            torch.cuda.synchronize()  # not permitted
        return h

    decoder.layers = failing
    session = Session(graphed, decoder, tolerance=2e-2)
    sequence = session.begin(5, None)
    session.decode([sequence])
    fail.clear()
    session.decode([sequence])
    session.decode([sequence, session.begin(7, None)])
    assert graphed.failed_captures == 1
    assert [key for key, graph in graphed._graphs.items() if graph is not None] == [(2, 0)]
