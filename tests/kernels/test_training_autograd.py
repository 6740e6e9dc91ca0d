"""`grouped_lora` under autograd: checkpointing, accumulation, what is saved and computed, and refusals."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loramill.errors import AdapterInvalid, EngineFault
from loramill.kernels import torch_backend, training
from loramill.kernels.training import Trainable, grouped_lora

from .training_oracle import ONE, TWO, assert_same_bits, example, gradients


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
