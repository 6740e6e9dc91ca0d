"""Adapters on embeddings: against a dense product, in any batch, and without an effect on other rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import AdapterInvalid, EngineFault
from loramill.kernels import Batch, Delta, Site
from loramill.kernels.adapters.embedding import adapt_embedding, batch_of_rows

from .oracle import assert_near, filled_slab, random_delta

VOCABULARY, WIDTH = 53, 40
SITES = [Site(WIDTH, ("q", "k"), (16, 8)), Site(VOCABULARY, ("embed",), (WIDTH,), lookup=True)]


def lookup(r: int) -> Delta:
    dense = random_delta(r, VOCABULARY, WIDTH)
    return Delta(dense.a, dense.b, lookup=True)


def loaded(dtype, layout, ranks=(1, 5, 16)):
    torch.manual_seed(1)
    adapters = [{"embed": lookup(r), "q": random_delta(3, WIDTH, 16)} for r in ranks]
    slab, slots = filled_slab(SITES, [*adapters, {"k": random_delta(2, WIDTH, 8)}], dtype, layout)
    return adapters, slab.views[1], slots


@pytest.mark.parametrize(("slab_dtype", "row_dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16")])
def test_rows_get_their_adapters_columns(ops, slab_dtype, row_dtype):
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    adapters, view, slots = loaded(types[slab_dtype], ops.layout)
    owners = [None, 0, 0, 1, 3, 2, 2, None, 1]
    tokens = torch.tensor([4, 0, 52, 4, 4, 17, 4, 4, 8])
    base = torch.randn(len(tokens), WIDTH).to(types[row_dtype])
    got = base.clone()
    adapt_embedding(
        tokens, got, view, Batch.of([(None if index is None else slots[index], 1) for index in owners]), scale=1.5
    )
    expected = base.double()
    for row, index in enumerate(owners):
        if index in (0, 1, 2):
            delta = adapters[index]["embed"]
            expected[row] += 1.5 * (delta.b.double() @ delta.a.double()[:, tokens[row]])
    assert_near(got, expected, {"fp32": 2e-6, "bf16": 1.2e-2, "int8": 3e-2}[slab_dtype])
    assert not torch.allclose(got.double(), base.double(), atol=0.1)
    untouched = [row for row, index in enumerate(owners) if index in (None, 3)]
    assert torch.equal(got[untouched], base[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(ops, dtype):
    _, view, slots = loaded(dtype, ops.layout)
    tokens, base = torch.randint(0, VOCABULARY, (70,)), torch.randn(70, WIDTH).to(dtype)
    together = base.clone()
    adapt_embedding(tokens, together, view, Batch.of([(slots[2], 70)]))
    for row in range(70):
        alone = base[row : row + 1].clone()
        adapt_embedding(tokens[row : row + 1], alone, view, Batch.of([(slots[2], 1)]))
        assert torch.equal(alone[0], together[row])


def test_a_stale_slot_is_an_error(ops):
    _, view, slots = loaded(torch.float32, ops.layout)
    view.slab.free(slots[0])
    with pytest.raises(EngineFault, match="freed"):
        adapt_embedding(torch.tensor([1]), torch.zeros(1, WIDTH), view, Batch.of([(slots[0], 1)]))


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"embed": random_delta(2, VOCABULARY, WIDTH)}, "'embed' is an embedding"),
        ({"q": Delta(torch.ones(2, WIDTH), torch.ones(16, 2), lookup=True)}, "'q' is a linear"),
        ({"embed": Delta(torch.ones(2, VOCABULARY), torch.ones(WIDTH, 2), torch.ones(WIDTH), True)}, "with a gain"),
        ({"embed": Delta(torch.ones(2, 9), torch.ones(WIDTH, 2), lookup=True)}, r"A of 'embed' is \[2, 9\]"),
    ],
)
def test_adapters_of_another_kind_of_module_are_refused(ops, deltas, message):
    _, view, _ = loaded(torch.float32, ops.layout)
    with pytest.raises(AdapterInvalid, match=message):
        view.slab.pack(deltas)


@settings(max_examples=60)
@given(data=st.data())
def test_some_rows_of_a_batch_keep_their_owners(data):
    from loramill.kernels.adapters.packing import ROWS

    _, view, slots = loaded(torch.float32, ROWS)
    counts = data.draw(st.lists(st.tuples(st.sampled_from([None, *slots]), st.integers(0, 4)), max_size=8))
    batch = Batch.of(counts)
    owners = [slot for slot, count in counts for _ in range(count)]
    rows = sorted(data.draw(st.sets(st.sampled_from(range(len(owners))))) if owners else [])
    some = batch_of_rows(batch, rows, view)
    got: list = [None] * some.rows
    for run in some.runs:
        got[run.rows] = [run.slot] * (run.rows.stop - run.rows.start)
    # The last adapter has nothing at this site.
    assert got == [None if owners[row] == slots[3] else owners[row] for row in rows]


def test_a_site_without_adapters_gets_no_plan_on_a_gpu():
    from loramill.kernels import triton

    _, view, slots = loaded(torch.float32, triton.layout)
    # The last adapter targets another site.
    batch = batch_of_rows(Batch.of([(None, 2), (slots[3], 1)]), [0, 1, 2], view)
    assert batch.rows == 3 and not batch.runs
    y = torch.randn(3, WIDTH)
    before = y.clone()
    triton.lora(torch.randn(3, VOCABULARY), y, view, batch)
    assert torch.equal(y, before)
    assert not any("StepWork" in str(key) for key in batch.memo)
