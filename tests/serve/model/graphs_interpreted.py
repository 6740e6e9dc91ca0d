"""Decodes over the Triton backend's own static buffers, interpreted in float32; test_graphs.py runs this."""

import importlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma3TextConfig
from triton.runtime import interpreter

from loramill.kernels import torch_backend, triton
from loramill.serve.model import load_decoder, loading
from loramill.serve.model.graphs import GraphedDecoder

from ...triton_interpreter import fast_interpreter, interpreter_ranges  # noqa: F401
from .graphed import CONFIG, Session, write_base
from .models import random_model

UNSHARED = ("architectures", "use_sliding_window", "sliding_window", "layer_types")
SIZES = {key: value for key, value in CONFIG.items() if key not in UNSHARED}

#: Operations of torch that launch nothing, besides views.
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do, by the names of kernels and of torch's operations."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        run = interpreter.GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.counts[executor.fn.__name__] += 1
            with torch._C._DisableTorchDispatch():
                return run(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # A `to` may return its argument; here each one converts.
        view = name != "to" and all(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        self.counts[name] += not view and name not in ALLOCATIONS
        return func(*args, **(kwargs or {}))


def loaded(folder, backend, monkeypatch):
    monkeypatch.setattr(loading, "backend", lambda *_: backend)
    return load_decoder(folder, dtype=torch.float32)


def test_decodes_of_the_triton_backend_in_graphs(tmp_path, monkeypatch):
    # The interpreter takes a millisecond per program, whether or not it has work.
    monkeypatch.setattr(importlib.import_module("loramill.kernels.triton.attention"), "SPLITS", (2, 2))
    folder, recorded = write_base(tmp_path / "base"), []

    def capture(run):
        """A capture records launches on fixed tensors; here they are launched again."""
        recorded.append(run().clone())
        return run

    decoder, eager = (loaded(folder, backend, monkeypatch) for backend in (triton, torch_backend))
    session = Session(GraphedDecoder(decoder, rows=(1, 3), ranks=(0, 4, 8), capture=capture), eager)
    for adapter_id, rank in enumerate((3, 8)):
        session.load(adapter_id, rank, share=0.4)
    sequences = [session.begin(length, adapter_id) for length, adapter_id in ((18, None), (3, 0), (33, 1))]
    session.decode(sequences)
    session.decode(sequences[:2])
    session.load(1, 5, seed=7, share=0.4)
    session.decode(sequences)
    # The rows are in another order, and one is missing.
    session.decode([sequences[2], sequences[0]])
    session.decode([sequences[0]])
    session.load(0, 9, share=0.2)
    session.decode([sequences[1]])  # too large for a graph
    assert [len(h) for h in recorded] == [3, 3, 1]


GEMMAS = {
    "gemma2": Gemma2Config(**SIZES, sliding_window=11, attn_logit_softcapping=2.0, query_pre_attn_scalar=24),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=11, sliding_window_pattern=2),
}


@pytest.mark.parametrize("name", GEMMAS)
def test_decodes_of_gemma_in_graphs(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.import_module("loramill.kernels.triton.attention"), "SPLITS", (2, 2))
    random_model(GEMMAS[name], tmp_path)
    decoder, eager = (loaded(tmp_path, backend, monkeypatch) for backend in (triton, torch_backend))
    session = Session(GraphedDecoder(decoder, rows=(2,), ranks=(0, 4), capture=lambda run: run), eager)
    session.load(0, 4, share=0.4)
    sequences = [session.begin(18, None), session.begin(5, 0)]
    session.decode(sequences)
    session.decode(sequences)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_layer_of_a_decode_with_norms_of_its_heads_is_at_most_19_launches(tmp_path, monkeypatch, rank):
    monkeypatch.setattr(importlib.import_module("loramill.kernels.triton.attention"), "SPLITS", (2, 2))
    captured = []

    def capture(run):
        run()
        with Launches(monkeypatch) as launches:
            run()
        captured.append(+launches.counts)
        return run

    decoder = loaded(write_base(tmp_path / "base"), triton, monkeypatch)
    session = Session(GraphedDecoder(decoder, rows=(1,), ranks=(0, 64), capture=capture), decoder)
    if rank:
        session.load(0, rank, share=1)
    session.decode([session.begin(1, 0 if rank else None)])
    (counts,) = captured
    per_layer = {"linear": 4, "norm_row": 2, "rotate_heads": 1, "attend": 1, "combine": 1, "gate_row": 1}
    if rank:
        per_layer |= {"shrink_row": 4, "expand_row": 4}
    assert sum(per_layer.values()) == (18 if rank else 10)
    # Once: the angles of the rows, and the norm before the first layer.
    once = Counter(to=1, mul=1, cos=1, sin=1, mul_=2, norm_row=1)
    assert counts == Counter({name: 2 * count for name, count in per_layer.items()}) + once
