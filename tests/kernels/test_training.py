"""`grouped_lora` against PEFT models, autograd of plain rows, finite differences, and itself in mixed batches."""

import copy
import functools
import itertools
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from loramill.errors import AdapterInvalid, EngineFault
from loramill.kernels import torch_backend, training
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.training import Trainable, dropout_seed, grouped_lora

SLOTS = tuple(Slot(index, 0) for index in range(6))
ONE, TWO, THREE = SLOTS[:3]


def trainable(r, d_in, d_out, dtype=torch.float32, **rest):
    a = torch.randn(r, d_in, dtype=dtype, requires_grad=True)
    b = torch.randn(d_out, r, dtype=dtype, requires_grad=True)
    return Trainable(a, b, **{"scale": 2 / math.sqrt(r), **rest})


def mask(seed, p, rows, d_in):
    """The docstring's dropout of ones."""
    words = torch.empty(math.ceil(rows * d_in / 4), dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    steps = round(p * 2**16)
    kept = words.view(torch.int16)[: rows * d_in].view(rows, d_in) >= steps - 2**15
    return kept / (1 - torch.tensor(steps / 2**16, dtype=torch.float64))


def plainly(x, base, adapters, batch, bias=None):
    """The contract one row at a time, for autograd."""
    owner = {row: run.slot for run in batch.runs for row in range(batch.rows)[run.rows]}
    masks = {}
    for slot, adapter in adapters.items():
        own = [row for row in range(batch.rows) if owner.get(row) == slot]
        drawn = mask(adapter.seed, adapter.dropout, len(own), x.shape[1])
        masks |= dict(zip(own, drawn, strict=True))
    lines = []
    for row in range(batch.rows):
        line = base @ x[row] if bias is None else base @ x[row] + bias
        if row in masks:
            adapter = adapters[owner[row]]
            seen = x[row] * masks[row].to(x.dtype)
            line = line + adapter.scale * (adapter.b.to(x.dtype) @ (adapter.a.to(x.dtype) @ seen))
        lines.append(line)
    return torch.stack(lines)


def assert_near(got, expected, tolerance, what):
    """Within tolerance of the largest expected element; the message shows the worst elements."""
    assert got.shape == expected.shape, what
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).abs().nan_to_num(nan=math.inf)
    limit = tolerance * max(expected.abs().max().item(), 1e-3)
    if error.max() > limit:
        worst = error.flatten().topk(min(5, error.numel())).indices
        shown = [(i, got.flatten()[i].item(), expected.flatten()[i].item()) for i in worst.tolist()]
        pytest.fail(
            f"{what} {list(got.shape)}: off by {error.max():.3g}, limit {limit:.3g}; (at, got, expected): {shown}"
        )


def assert_same_bits(got, expected, what):
    assert torch.equal(got, expected), f"{what}: {(got != expected).sum()} of {got.numel()} elements differ"


def gradients(function, x, base, adapters, batch, dy, **rest):
    """y, and the gradients of x and of every adapter's a and b, as a dictionary."""
    wanted = {"x": x} | {f"{slot.index}.{n}": getattr(t, n) for slot, t in adapters.items() for n in "ab"}
    y = function(x, base, adapters, batch, **rest)
    found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


# Against PEFT


class Masked(nn.Module):
    """PEFT's dropout, with the mask that `grouped_lora` draws."""

    def __init__(self, p, seed):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        return x * mask(self.seed, self.p, x.numel() // x.shape[-1], x.shape[-1]).to(x.dtype).view_as(x)


class Grouped(nn.Module):
    """A linear of a model of several tenants; `step` holds their shared batch."""

    def __init__(self, linear, adapters, step):
        super().__init__()
        self.linear, self.adapters, self.step = linear, adapters, step

    def forward(self, x):
        y = grouped_lora(x.flatten(0, -2), self.linear.weight, self.adapters, self.step["batch"], self.linear.bias)
        return y.unflatten(0, x.shape[:-1])


def tenants_of(base, configs):
    """One PEFT model per tenant, with seeded dropout, and one model for all, on copies of their parameters."""
    together, step = copy.deepcopy(base).requires_grad_(False), {}
    models, pairs, sites = {}, [], {}
    for slot, config in configs.items():
        models[slot] = get_peft_model(copy.deepcopy(base), config).train()
        for name, module in models[slot].base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                seed = dropout_seed(f"tenant-{slot.index}", 7, name)
                module.lora_dropout["default"] = Masked(config.lora_dropout, seed)
                theirs = module.lora_A["default"].weight, module.lora_B["default"].weight
                ours = [weight.detach().clone().requires_grad_() for weight in theirs]
                scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
                sites.setdefault(name, {})[slot] = Trainable(*ours, scale, config.lora_dropout, seed)
                pairs += [(f"{slot.index}:{name}.{n}", o, t) for n, o, t in zip("AB", ours, theirs, strict=True)]
    for name, adapters in sites.items():
        parent, _, leaf = name.rpartition(".")
        setattr(together.get_submodule(parent), leaf, Grouped(together.get_submodule(name), adapters, step))
    return models, together, step, pairs


def assert_like_peft(models, together, step, pairs, inputs, owners, loss):
    """One step of all tenants together against one per tenant; `owners` are the slots of the samples in `inputs`."""
    per_sample = inputs.shape[1]
    step["batch"] = Batch.of((owner, per_sample) for owner in owners)
    out = together(inputs)
    chosen = {slot: [i for i, owner in enumerate(owners) if owner == slot] for slot in models}
    ours = {slot: loss(out, inputs)[chosen[slot]].mean() for slot in models}
    sum(ours.values()).backward()
    for slot, model in models.items():
        alone = inputs[chosen[slot]]
        theirs = loss(model(alone), alone).mean()
        theirs.backward()
        assert_near(ours[slot], theirs, 1e-5, f"loss of {slot.index}")
    assert len(pairs) >= 2 * len(models)
    for name, our, their in pairs:
        assert their.grad.abs().max() > 0
        assert_near(our.grad, their.grad, 1e-5, f"gradient of {name}")


def lora_config(r, p, targets, rslora, **rest):
    # init_lora_weights=False: a random B, as zeros would hide A's gradient.
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        lora_dropout=p,
        target_modules=targets,
        use_rslora=rslora,
        init_lora_weights=False,
        **rest,
    )


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 41), nn.Linear(41, 24, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_those_of_separate_peft_runs_of_linears(p):
    configs = {
        ONE: lora_config(1, p, ["up", "down"], rslora=False),
        TWO: lora_config(256, p, ["up"], rslora=True),
        THREE: lora_config(19, p, ["down"], rslora=False),
        SLOTS[3]: lora_config(64, 0.5, ["up", "down"], rslora=True),
    }
    tenants = tenants_of(Tiny(), configs)
    owners = [ONE, TWO, None, ONE, ONE, THREE, SLOTS[3], TWO, None]
    assert_like_peft(*tenants, torch.randn(9, 5, 24), owners, lambda y, x: (y - x.flip(1)).square().mean((1, 2)))


def next_token_loss(out, ids):
    logits = out.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def test_gradients_are_those_of_separate_peft_runs_of_a_llama():
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 97}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).float()
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = {
        ONE: lora_config(8, 0.1, every, rslora=False, task_type="CAUSAL_LM"),
        TWO: lora_config(33, 0.25, ["q_proj", "v_proj"], rslora=True, task_type="CAUSAL_LM"),
        THREE: lora_config(2, 0.0, every[4:], rslora=False, task_type="CAUSAL_LM"),
    }
    owners = [TWO, ONE, ONE, None, THREE, TWO, ONE]
    assert_like_peft(*tenants_of(base, configs), torch.randint(0, 97, (7, 13)), owners, next_token_loss)


# Against autograd of plain rows, and finite differences


@settings(max_examples=200)
@given(
    counts=st.lists(st.tuples(st.sampled_from([None, *SLOTS]), st.integers(0, 5)), min_size=1, max_size=8),
    ranks=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    dropouts=st.lists(st.sampled_from([0.0, 0.25, 0.9]), min_size=6, max_size=6),
    targeted=st.sets(st.sampled_from(SLOTS)),
    with_bias=st.booleans(),
    sizes=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    seed=st.integers(0, 2**32),
)
def test_any_batch_equals_its_rows_one_by_one(counts, ranks, dropouts, targeted, with_bias, sizes, seed):
    torch.manual_seed(seed)
    d_in, d_out = sizes
    batch = Batch.of(counts)
    adapters = {
        slot: trainable(r, d_in, d_out, torch.float64, dropout=p, seed=seed + slot.index)
        for slot, r, p in zip(SLOTS, ranks, dropouts, strict=True)
        if slot in targeted
    }
    x = torch.randn(batch.rows, d_in, dtype=torch.float64, requires_grad=True)
    base, dy = torch.randn(d_out, d_in, dtype=torch.float64), torch.randn(batch.rows, d_out, dtype=torch.float64)
    bias = torch.randn(d_out, dtype=torch.float64) if with_bias else None
    got = gradients(grouped_lora, x, base, adapters, batch, dy, bias=bias)
    if batch.rows == 0:
        assert got["y"].shape == (0, d_out)
        return
    expected = gradients(plainly, x, base, adapters, batch, dy, bias=bias)
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), f"gradient of {name}"
        if value is not None:
            assert_near(got[name], value, 1e-10, name)


@pytest.mark.parametrize(
    ("d_in", "d_out", "ranks"), [(37, 29, (1, 256, 7)), (128, 61, (64, 3, 100)), (5, 3, (1, 2, 3))]
)
def test_float32_agrees_within_rounding(d_in, d_out, ranks):
    adapters = {slot: trainable(r, d_in, d_out, dropout=0.2, seed=r) for slot, r in zip(SLOTS, ranks, strict=False)}
    batch = Batch.of([(ONE, 30), (None, 3), (TWO, 41), (ONE, 1), (THREE, 7)])
    x, dy = torch.randn(82, d_in, requires_grad=True), torch.randn(82, d_out)
    base = torch.randn(d_out, d_in)
    got, expected = (gradients(f, x, base, adapters, batch, dy) for f in (grouped_lora, plainly))
    for name, value in expected.items():
        assert_near(got[name], value, 1e-5, name)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(p):
    base, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    batch = Batch.of([(ONE, 2), (None, 1), (TWO, 3), (ONE, 1)])
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    one, two = trainable(2, 4, 5, torch.float64), trainable(3, 4, 5, torch.float64)

    def function(x, a1, b1, a2, b2):
        adapters = {ONE: Trainable(a1, b1, 0.7, p, seed=1), TWO: Trainable(a2, b2, 1.3, p, seed=2)}
        return grouped_lora(x, base, adapters, batch, bias)

    assert torch.autograd.gradcheck(function, (x, one.a, one.b, two.a, two.b))


# The base


def test_rows_without_an_adapter_are_the_bases_alone():
    batch = Batch.of([(None, 3), (ONE, 4), (TWO, 2), (None, 1), (THREE, 5)])
    x, base, bias = torch.randn(15, 37), torch.randn(29, 37), torch.randn(29)
    y = grouped_lora(x, base, {ONE: trainable(4, 37, 29), THREE: trainable(5, 37, 29)}, batch, bias)
    alone = F.linear(x, base, bias)
    untouched = [0, 1, 2, 7, 8, 9]
    assert_same_bits(y[untouched], alone[untouched], "rows of the base, and of an adapter without a target here")
    assert not torch.isclose(y, alone).all(dim=1)[[3, 4, 5, 6, 10, 11, 12, 13, 14]].any()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_bfloat16(adapter_dtype):
    adapters = {slot: trainable(r, 96, 72, adapter_dtype, dropout=0.1, seed=r) for slot, r in ((ONE, 8), (TWO, 64))}
    batch = Batch.of([(ONE, 20), (None, 2), (TWO, 30), (ONE, 9)])
    x = torch.randn(61, 96).bfloat16().requires_grad_()
    base, dy = torch.randn(72, 96).bfloat16(), torch.randn(61, 72).bfloat16()
    got = gradients(grouped_lora, x, base, adapters, batch, dy)
    exact = {slot: Trainable(t.a.double(), t.b.double(), t.scale, t.dropout, t.seed) for slot, t in adapters.items()}
    expected = gradients(plainly, x.detach().double().requires_grad_(), base.double(), exact, batch, dy.double())
    for name, value in expected.items():
        is_adapters = name not in "xy"
        assert got[name].dtype == (adapter_dtype if is_adapters else torch.bfloat16), name
        # Products in float32 of exact bfloat16 inputs: an adapter's own gradients lose nothing.
        narrow = adapter_dtype == torch.bfloat16 or not is_adapters
        assert_near(got[name], value, 2e-2 if narrow else 1e-5, name)


def test_a_delta_of_wider_dtype_is_rounded_with_the_sum():
    batch = Batch.of([(ONE, 50)])
    x, base = torch.randn(50, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    adapter = trainable(16, 64, 48)
    y = grouped_lora(x, base, {ONE: adapter}, batch)
    delta = x.float() @ adapter.a.T @ adapter.b.T * adapter.scale
    once = (F.linear(x, base).float() + delta).bfloat16()
    assert (y != once).float().mean() < 0.01, "two orders of the same float32 sums may straddle a tie, but rarely"
    assert (F.linear(x, base) + delta.bfloat16() != y).float().mean() > 0.05, (
        "the inputs don't show whether rounding happens once or twice"
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_nf4(dtype, nested):
    bnb = pytest.importorskip("bitsandbytes")
    weight = bnb.nn.Params4bit(torch.randn(96, 128).to(dtype), quant_type="nf4", compress_statistics=nested).to("cpu")
    assert weight.dtype == torch.uint8
    assert weight.quant_state.nested == nested
    base = functools.partial(bnb.functional.dequantize_4bit, weight.data, weight.quant_state)
    adapters = {ONE: trainable(8, 128, 96, dropout=0.2, seed=1), TWO: trainable(31, 128, 96)}
    batch = Batch.of([(ONE, 9), (None, 4), (TWO, 12), (ONE, 2)])
    x, dy = torch.randn(27, 128).to(dtype).requires_grad_(), torch.randn(27, 96).to(dtype)
    got = gradients(grouped_lora, x, base, adapters, batch, dy)
    expected = gradients(plainly, x, base(), adapters, batch, dy)
    for name, value in expected.items():
        assert_near(got[name], value, 1e-5 if dtype == torch.float32 else 3e-2, name)
    module = bnb.nn.LinearNF4(128, 96, bias=False)
    module.weight = weight
    assert_near(got["y"][9:13], module(x)[9:13], 1e-5 if dtype == torch.float32 else 3e-2, "rows of the base")


def test_a_weight_that_is_computed_is_not_kept():
    weight, made = torch.randn(6, 8), []

    def make():
        fresh = weight.clone()
        made.append(weakref.ref(fresh))
        return fresh

    x = torch.randn(4, 8, requires_grad=True)
    y = grouped_lora(x, make, {ONE: trainable(2, 8, 6)}, Batch.of([(ONE, 4)]))
    assert [ref() for ref in made] == [None]
    y.sum().backward()
    assert [ref() for ref in made] == [None, None]


# Neighbors


def alone_and_among(adapter, x, dy, neighbors, base):
    """The adapter's y and gradients by itself, and among `neighbors` (pairs of slot and rows around every row)."""
    rows = len(x)
    alone = gradients(grouped_lora, x, base, {ONE: adapter}, Batch.of([(ONE, rows)]), dy)
    counts = list(itertools.chain.from_iterable([(ONE, 1), *neighbors] for _ in range(rows)))
    batch = Batch.of(counts)
    own = torch.tensor([row for run in batch.runs if run.slot == ONE for row in range(batch.rows)[run.rows]])
    wide = torch.randn(batch.rows, x.shape[1]).index_copy(0, own, x.detach()).requires_grad_()
    wide_dy = torch.randn(batch.rows, dy.shape[1]).index_copy(0, own, dy)
    others = {slot: trainable(5, x.shape[1], dy.shape[1], dropout=0.5, seed=9) for slot in (TWO, THREE)}
    among = gradients(grouped_lora, wide, base, {**others, ONE: adapter}, batch, wide_dy)
    return alone, {"0.a": among["0.a"], "0.b": among["0.b"], "y": among["y"][own], "x": among["x"][own]}


@pytest.mark.parametrize("neighbors", [[(None, 1)], [(TWO, 2)], [(TWO, 1), (None, 3), (THREE, 1)]])
def test_an_adapter_trains_the_same_among_any_neighbors(neighbors):
    adapter = trainable(8, 64, 48, dropout=0.5, seed=3)
    x, dy, base = torch.randn(11, 64, requires_grad=True), torch.randn(11, 48), torch.randn(48, 64)
    alone, among = alone_and_among(adapter, x, dy, neighbors, base)
    assert_same_bits(among["0.a"], alone["0.a"], "gradient of a")
    assert_same_bits(among["0.b"], alone["0.b"], "gradient of b")
    # The base's products may group more rows differently; a wrong mask would be off by a whole element.
    assert_near(among["y"], alone["y"], 1e-5, "y")
    assert_near(among["x"], alone["x"], 1e-5, "gradient of x")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "b", "rows", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_with_their_adapter(where, poison, dtype):
    def run(poisoned, *, present=True):
        adapters = dict(kept)
        wide, narrow = x.detach().clone(), dy.clone()
        if present:
            adapters[TWO] = bad
        if poisoned:
            a, b = bad.a.detach().clone(), bad.b.detach().clone()
            {"a": a, "b": b, "rows": wide[own], "gradient": narrow[own]}[where].view(-1)[5] = poison
            adapters[TWO] = Trainable(a.requires_grad_(), b.requires_grad_(), 1.0, 0.3, 2)
        return gradients(grouped_lora, wide.requires_grad_(), base, adapters, batch, narrow)

    own = slice(6, 15)
    batch = Batch.of([(ONE, 4), (None, 2), (TWO, 9), (THREE, 5), (ONE, 3)])
    others = [row for row in range(23) if row not in range(6, 15)]
    kept = {ONE: trainable(8, 40, 32, dropout=0.3, seed=1), THREE: trainable(20, 40, 32)}
    bad = trainable(8, 40, 32, scale=1.0, dropout=0.3, seed=2)
    x, dy, base = torch.randn(23, 40).to(dtype), torch.randn(23, 32).to(dtype), torch.randn(32, 40).to(dtype)
    poisoned, healthy, absent = run(True), run(False), run(False, present=False)
    hit = [
        t for t in (poisoned["y"][own], poisoned["x"][own], poisoned["1.a"], poisoned["1.b"]) if not t.isfinite().all()
    ]
    assert hit, "the poison did nothing"
    for other in (healthy, absent):
        for name in ("0.a", "0.b", "2.a", "2.b"):
            assert_same_bits(poisoned[name], other[name], f"gradient of {name}")
        assert_same_bits(poisoned["y"][others], other["y"][others], "y of the others")
        assert_same_bits(poisoned["x"][others], other["x"][others], "gradient of x of the others")


# Dropout


def dropped(p, seed, rows=256, d=64, dtype=torch.float32):
    """Dropout of ones, and the gradient of its input: the adapter is the identity and the base 0."""
    eye = torch.eye(d)
    x = torch.ones(rows, d, dtype=dtype, requires_grad=True)
    y = grouped_lora(
        x, torch.zeros(d, d, dtype=dtype), {ONE: Trainable(eye, eye, 1.0, p, seed)}, Batch.of([(ONE, rows)])
    )
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_hides_a_fraction_p_and_keeps_the_mean(p):
    seed = torch.randint(2**62, ()).item()
    y, dx = dropped(p, seed)
    hidden = y == 0
    deviation = math.sqrt(p * (1 - p) / y.numel())
    assert abs(hidden.double().mean() - p) < 6 * deviation
    assert abs(y.double().mean() - 1) < 6 * deviation / (1 - p) + 1e-4
    torch.testing.assert_close(y[~hidden], torch.full_like(y[~hidden], 1 / (1 - p)), rtol=1e-4, atol=0)
    assert_same_bits(dx, y, "the mask of the backward")
    # Each row and column has the same fraction; neighbors within a random word are independent.
    for axis in (0, 1):
        assert (hidden.double().mean(axis) - p).abs().max() < 7 * math.sqrt(p * (1 - p) / hidden.shape[axis])
    pairs = (hidden[:, 1:] & hidden[:, :-1]).double().mean()
    assert abs(pairs - p * p) < 8 * p / math.sqrt(y.numel())


def test_the_mask_is_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first, _ = dropped(0.5, 11)
    state = torch.get_rng_state()
    again, _ = dropped(0.5, 11)
    assert_same_bits(again, first, "the same seed")
    assert_same_bits(torch.get_rng_state(), state, "torch's own generator")
    assert_same_bits(dropped(0.5, 11, dtype=torch.bfloat16)[0].float(), first, "another dtype of x")
    other, _ = dropped(0.5, 12)
    assert abs((other == first).double().mean() - 0.5) < 0.05


def test_seeds_are_those_of_adapter_step_and_site():
    names = ("acme/support", "acme/support1", "globex/'x'")
    keys = list(itertools.product(names, (0, 1, 11), ("model.layers.1.q", "model.layers.11.q", "1")))
    seeds = [dropout_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(torch.Generator().manual_seed(seed) for seed in seeds)
    assert dropout_seed("acme/support", 3, "model.layers.0.self_attn.q_proj") == 5345779790828726843


# Autograd


def example(p=0.3):
    adapters = {ONE: trainable(3, 12, 10, dropout=p, seed=1), TWO: trainable(7, 12, 10, dropout=p, seed=2)}
    batch = Batch.of([(ONE, 4), (None, 1), (TWO, 6), (ONE, 2)])
    return torch.randn(13, 12, requires_grad=True), torch.randn(10, 12), adapters, batch


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    x, base, adapters, batch = example()
    dy = torch.randn(13, 10)

    def checkpointed(*arguments):
        return checkpoint(lambda *a: torch.tanh(grouped_lora(*a)), *arguments, use_reentrant=reentrant)

    kept = {f"{slot.index}.{n}": getattr(t, n) for slot, t in adapters.items() for n in "ab"} | {"x": x}
    found = []
    for function in (checkpointed, lambda *a: torch.tanh(grouped_lora(*a))):
        for tensor in kept.values():
            tensor.grad = None
        function(x, base, adapters, batch).backward(dy)
        found.append({name: tensor.grad for name, tensor in kept.items()})
    for name in kept:
        assert_same_bits(found[0][name], found[1][name], f"gradient of {name}")


def test_gradients_accumulate_over_micro_batches_and_backwards():
    x, base, adapters, batch = example()
    one = adapters[ONE]
    y = grouped_lora(x, base, adapters, batch)
    y.sum().backward(retain_graph=True)
    first = [t.grad.clone() for t in (x, one.a, one.b)]
    y.sum().backward()
    for tensor, grad in zip((x, one.a, one.b), first, strict=True):
        assert_same_bits(tensor.grad, grad + grad, "after a second backward")
    other = torch.randn_like(x, requires_grad=True)
    expected = gradients(grouped_lora, other, base, adapters, batch, torch.ones(13, 10))
    before = one.a.grad.clone()
    grouped_lora(other, base, adapters, batch).sum().backward()
    assert_same_bits(one.a.grad, before + expected["0.a"], "after another micro-batch")


def test_a_cast_gives_the_bits_of_weights_that_autograd_casts():
    x, base, adapters, batch = example()
    x, base = x.detach().bfloat16().requires_grad_(), base.bfloat16()
    dy = torch.randn(13, 10).bfloat16()

    def casting(x, base, adapters, batch):
        cast = {slot: replace(t, a=t.a.bfloat16(), b=t.b.bfloat16()) for slot, t in adapters.items()}
        return grouped_lora(x, base, cast, batch)

    with torch.no_grad():
        ready = {slot: replace(t, cast=(t.a.bfloat16(), t.b.bfloat16())) for slot, t in adapters.items()}
    expected = gradients(casting, x, base, adapters, batch, dy)
    for name, value in gradients(grouped_lora, x, base, ready, batch, dy).items():
        assert_same_bits(value, expected[name], name)
        assert value.dtype == (torch.bfloat16 if name in ("x", "y") else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_products_give_the_same_results(dtype, monkeypatch):
    monkeypatch.setattr(training, "backend", lambda _: torch_backend)
    x, base, adapters, batch = example()
    x, base, dy = x.detach().to(dtype).requires_grad_(), base.to(dtype), torch.randn(13, 10).to(dtype)
    adapters = {
        slot: replace(t, a=t.a.detach().to(dtype).requires_grad_(), b=t.b.detach().to(dtype).requires_grad_())
        for slot, t in adapters.items()
    }
    expected = gradients(grouped_lora, x, base, adapters, batch, dy)
    launches = []
    in_one = training._product_in_one
    monkeypatch.setattr(training, "_scaled_product", lambda *args: launches.append(args) or in_one(*args))
    found = gradients(grouped_lora, x, base, adapters, batch, dy)
    assert len(launches) == 2 * len(adapters)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 2 * torch.finfo(dtype).eps * value.norm()


def test_a_gradient_of_a_gradient_is_refused():
    x, base, adapters, batch = example()
    y = grouped_lora(x, base, adapters, batch).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_parameter_changed_before_the_backward_is_noticed():
    x, base, adapters, batch = example()
    y = grouped_lora(x, base, adapters, batch)
    with torch.no_grad():
        adapters[TWO].a.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("wanted", itertools.chain.from_iterable(itertools.combinations("xab", n) for n in (1, 2)))
def test_only_gradients_that_are_wanted_are_computed(wanted):
    x, base, adapters, batch = example()
    dy = torch.randn(13, 10)
    full = gradients(grouped_lora, x, base, adapters, batch, dy)
    x.requires_grad_("x" in wanted)
    adapters[ONE].a.requires_grad_("a" in wanted)
    adapters[ONE].b.requires_grad_("b" in wanted)
    grouped_lora(x, base, adapters, batch).backward(dy)
    for letter, name, tensor in (("x", "x", x), ("a", "0.a", adapters[ONE].a), ("b", "0.b", adapters[ONE].b)):
        if letter in wanted:
            assert_same_bits(tensor.grad, full[name], f"gradient of {name}")
        else:
            assert tensor.grad is None
    assert_same_bits(adapters[TWO].a.grad, full["1.a"], "gradient of the other adapter")


def saved_shapes(x, base, adapters, batch):
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        grouped_lora(x, base, adapters, batch).sum().backward()
    return sorted(shapes)


def test_neither_masks_nor_the_base_are_saved_and_x_only_for_adapters():
    x, base, adapters, batch = example(p=0.3)
    parameters = [(3, 12), (10, 3), (6, 3), (7, 12), (10, 7), (6, 7)]
    assert saved_shapes(x, base, adapters, batch) == sorted([(13, 12), *parameters])
    assert saved_shapes(x, base, {}, batch) == []


def test_autocast_changes_nothing():
    x, base, adapters, batch = example()
    dy = torch.randn(13, 10)
    plain = gradients(grouped_lora, x, base, adapters, batch, dy)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(grouped_lora, x, base, adapters, batch, dy)
    for name, value in plain.items():
        assert_same_bits(cast[name], value, name)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.zeros(3, 13)},
            r"A is \[3, 13\] and B \[10, 3\] in slot 0; this linear needs \[r, 12\] and \[10, r\]",
        ),
        ({"b": torch.zeros(10, 4)}, r"B \[10, 4\]"),
        ({"b": torch.zeros(11, 3)}, r"B \[11, 3\]"),
        ({"a": torch.zeros(0, 12), "b": torch.zeros(10, 0)}, "a rank r above 0"),
        ({"a": torch.tensor(1.0)}, r"A is \[\]"),
        ({"a": torch.zeros(3, 12).bfloat16()}, "one floating dtype"),
        ({"a": torch.zeros(3, 12).int(), "b": torch.zeros(10, 3).int()}, "one floating dtype"),
        ({"dropout": 1.0}, "dropout of slot 0 is 1.0"),
        ({"dropout": -0.1}, "dropout of slot 0 is -0.1"),
        ({"dropout": math.nan}, "dropout of slot 0 is nan"),
        ({"cast": (torch.zeros(3, 12), torch.zeros(10, 4))}, "cast of A and B in slot 0 has other shapes"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change, message):
    x, base, adapters, batch = example()
    one = adapters[ONE]
    fields = {"a": one.a, "b": one.b, "scale": 1.0, "dropout": 0.0, **change}
    with pytest.raises(AdapterInvalid, match=message):
        grouped_lora(x, base, {**adapters, ONE: Trainable(**fields)}, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(12, 12)}, r"x is \[12, 12\], but the batch has 13 rows"),
        ({"x": torch.zeros(13, 1, 12)}, r"pass x as \[rows, d_in\]"),
        ({"base": torch.zeros(10, 11)}, r"The base is \[10, 11\]"),
        ({"base": torch.zeros(10, 12).bfloat16()}, "of x's dtype"),
        ({"base": lambda: torch.zeros(60, 1, dtype=torch.uint8)}, "or a function that returns that"),
        ({"base": nn.Parameter(torch.zeros(10, 12))}, "freeze"),
        ({"bias": nn.Parameter(torch.zeros(10))}, "freeze"),
        ({"bias": torch.zeros(12)}, r"The bias is \[12\]"),
        ({"bias": torch.zeros(10).double()}, r"it must be \[10\] torch.float32"),
    ],
)
def test_a_batch_or_base_that_does_not_fit_is_refused(change, message):
    x, base, adapters, batch = example()
    with pytest.raises(EngineFault, match=message):
        grouped_lora(**{"x": x, "base": base, "adapters": adapters, "batch": batch, **change})
