"""Adapters of embeddings by the Triton kernel against plain torch; test_triton_decoder.py runs this interpreted."""

import importlib

import pytest
import torch

from loramill.errors import EngineFault
from loramill.kernels import Batch, Delta, Site, triton
from loramill.kernels.adapters.embedding import adapt_embedding

from ..triton_interpreter import fast_interpreter  # noqa: F401
from .oracle import assert_near, filled_slab, random_delta

host = importlib.import_module("loramill.kernels.triton.embedding")

#: More columns than a program has.
VOCABULARY, WIDTH = 53, 520
SITES = [Site(WIDTH, ("q", "k"), (16, 8)), Site(VOCABULARY, ("embed",), (WIDTH,), lookup=True)]
OWNERS = [None, 0, 0, 1, 3, 2, 2, None, 1]


def loaded(dtype, draw=torch.randn):
    """Adapters of ranks 1, 5 and 17, and one of another site."""

    def lookup(r):
        return Delta(draw(r, VOCABULARY), draw(WIDTH, r), lookup=True)

    adapters = [{"embed": lookup(r), "q": random_delta(3, WIDTH, 16)} for r in (1, 5, 17)]
    slab, slots = filled_slab(SITES, [*adapters, {"k": random_delta(2, WIDTH, 8)}], dtype, triton.layout)
    return slab.views[1], Batch.of([(None if index is None else slots[index], 1) for index in OWNERS])


def integers(*shape):
    return torch.randint(-4, 5, shape).float()


def inputs(dtype):
    wide = torch.randn(len(OWNERS), WIDTH + 7).to(dtype)
    return torch.randint(0, VOCABULARY, (len(OWNERS),)), wide[:, 3 : 3 + WIDTH]


@pytest.mark.parametrize(
    ("slab_dtype", "dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float16, torch.float16, 1e-3),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.int8, torch.float32, 1e-6),
        (torch.int8, torch.bfloat16, 2e-2),
    ],
    ids=str,
)
def test_one_launch_computes_what_plain_torch_does(slab_dtype, dtype, tolerance, monkeypatch):
    view, batch = loaded(slab_dtype)
    tokens, got = inputs(dtype)
    before, expected = got.clone(), got.clone()
    launched = []
    monkeypatch.setattr(
        host, "to_device", lambda numbers, device: launched.append(numbers) or torch.from_numpy(numbers)
    )
    triton.adapt_embedding(tokens, got, view, batch, scale=1.5)
    adapt_embedding(tokens, expected, view, batch, scale=1.5)
    assert_near(got, expected, tolerance)
    untouched = [row for row, owner in enumerate(OWNERS) if owner in (None, 3)]
    assert torch.equal(got[untouched], before[untouched])
    (table,) = launched
    assert table[:, 0].tolist() == [1, 2, 3, 5, 6, 8]


def test_sums_without_rounding_are_exact():
    view, batch = loaded(torch.float32, integers)
    tokens, got = inputs(torch.float32)
    got.copy_(got.round())
    expected = got.clone()
    triton.adapt_embedding(tokens, got, view, batch)
    adapt_embedding(tokens, expected, view, batch)
    assert torch.equal(got, expected)


def test_a_row_has_the_same_bits_in_any_batch():
    view, batch = loaded(torch.float32)
    tokens, together = inputs(torch.float32)
    before = together.clone()
    triton.adapt_embedding(tokens, together, view, batch)
    for run in batch.runs:
        for row in range(run.rows.start, run.rows.stop):
            alone = before[row : row + 1].clone()
            triton.adapt_embedding(tokens[row : row + 1], alone, view, Batch.of([(run.slot, 1)]))
            assert torch.equal(alone[0], together[row])


def test_without_a_target_nothing_is_launched(monkeypatch):
    view, batch = loaded(torch.float32)
    monkeypatch.setattr(host, "embed_row", None)
    tokens, y = inputs(torch.float32)
    of_another_site = batch.runs[2].slot
    triton.adapt_embedding(tokens[:3], y[:3], view, Batch.of([(None, 2), (of_another_site, 1)]))
    triton.adapt_embedding(tokens, y, view, Batch.of([(None, len(OWNERS))]))


def test_stale_slots_and_wrong_tensors_are_errors():
    view, batch = loaded(torch.float32)
    tokens, y = inputs(torch.float32)
    for bad_tokens, bad_y in ((tokens.int(), y), (tokens[:3], y), (tokens, y[:, 1:]), (tokens, y.T.contiguous().T)):
        with pytest.raises(EngineFault, match="must be int64"):
            triton.adapt_embedding(bad_tokens, bad_y, view, batch)
    view.slab.free(batch.runs[0].slot)
    with pytest.raises(EngineFault, match="freed"):
        triton.adapt_embedding(tokens, y, view, batch)
