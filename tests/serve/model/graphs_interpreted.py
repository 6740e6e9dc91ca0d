"""Decodes over the Triton backend's own static buffers, interpreted in float32; test_graphs.py runs this."""

import importlib

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig
from triton.runtime import interpreter

from loramill.kernels import torch_backend, triton
from loramill.serve.model import load_decoder, loading
from loramill.serve.model.graphs import GraphedDecoder

from .graphed import CONFIG, Session, write_base
from .models import random_model

UNSHARED = ("architectures", "use_sliding_window", "sliding_window", "layer_types")
SIZES = {key: value for key, value in CONFIG.items() if key not in UNSHARED}


@pytest.fixture(autouse=True)
def interpreter_ranges(monkeypatch):
    """As in tests/kernels/triton_attention_interpreted.py."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


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
