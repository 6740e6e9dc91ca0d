"""All layers in one call of the native kernels, against the same layers one operation at a time: equal bits."""

from dataclasses import dataclass

import pytest
import torch

from loramill.errors import EngineFault
from loramill.kernels import Batch, Delta, KVSpan, Pages, Site, Slab
from loramill.kernels.layers import Layer, Linear, Mlp, Stack, Step, run_layers, run_one_by_one


@dataclass(frozen=True)
class Shape:
    hidden: int = 48
    intermediate: int = 56
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    biased: bool = False
    qk_norm: bool = False
    window: int | None = None


SHAPES = {
    "llama": Shape(),
    "biased": Shape(biased=True),
    "qwen3": Shape(qk_norm=True),
    "window": Shape(window=5),
    "blocks that modules share": Shape(heads=3, kv_heads=3, head_dim=20),
    "whole blocks": Shape(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32),
    "wide heads, narrow residual": Shape(hidden=32, intermediate=24, heads=8, kv_heads=1, head_dim=32),
}
LAYERS = 3


def build(ops, shape: Shape, dtype: torch.dtype) -> tuple[Stack, list[Site]]:
    sites: list[Site] = []

    def linear(name: str, d_in: int, *widths: int) -> Linear:
        sites.append(Site(d_in, tuple(f"{len(sites)}.{name}{i}" for i in range(len(widths))), widths))
        weight = torch.randn(sum(widths), d_in) / d_in**0.5
        bias = torch.randn(sum(widths)).to(dtype) if shape.biased else None
        return Linear(ops.pack(weight.to(dtype)), bias, len(sites) - 1)

    def norm(d: int) -> torch.Tensor:
        return (torch.rand(d) + 0.5).to(dtype)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers = tuple(
        Layer(
            input_norm=norm(shape.hidden),
            qkv=linear("qkv", shape.hidden, q, kv, kv),
            q_norm=norm(shape.head_dim) if shape.qk_norm else None,
            k_norm=norm(shape.head_dim) if shape.qk_norm else None,
            o=linear("o", q, shape.hidden),
            post_norm=norm(shape.hidden),
            mlp=Mlp(
                linear("gate_up", shape.hidden, shape.intermediate, shape.intermediate),
                linear("down", shape.intermediate, shape.hidden),
            ),
            window=shape.window if index % 2 == 0 else None,
        )
        for index in range(LAYERS)
    )
    return Stack(layers, norm(shape.hidden), shape.heads, 1e-5), sites


def loaded(ops, sites: list[Site], dtype: torch.dtype) -> tuple[Slab, list]:
    """Three adapters: on everything, on every other module and with a gain, and on the last site alone."""
    slab = Slab(sites, slots=3, size=1 << 20, dtype=dtype, layout=ops.layout)
    modules = [
        (name, site.d_in, width) for site in sites for name, width in zip(site.modules, site.widths, strict=True)
    ]
    slots = []
    for rank, chosen in ((7, modules), (16, modules[::2]), (3, modules[-1:])):
        deltas = {
            name: Delta(
                torch.randn(rank, d_in) / d_in**0.5,
                torch.randn(width, rank) / rank**0.5,
                torch.rand(width) + 0.5 if rank == 16 else None,
            )
            for name, d_in, width in chosen
        }
        packed = slab.pack(deltas)
        slots.append(slab.allocate(packed.bytes))
        slab.load(slots[-1], packed)
    return slab, slots


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapters"])
def test_one_call_has_the_bits_of_many(native, dtype, name, adapted):
    shape = SHAPES[name]
    stack, sites = build(native, shape, dtype)
    slab, slots = loaded(native, sites, dtype)
    spans = [KVSpan(0, 19, [3, 1]), KVSpan(20, 1, [0, 5]), KVSpan(3, 1, [4]), KVSpan(7, 2, [2])]
    pages = Pages.of(spans, 16)
    batch = Batch.of(zip([slots[0], None, slots[1], slots[2]], [19, 1, 1, 2], strict=True) if adapted else [(None, 23)])
    angles = torch.rand(pages.rows, shape.head_dim // 2)
    step = Step(angles.cos(), angles.sin(), pages, slab, batch)
    x = torch.randn(pages.rows, shape.hidden).to(dtype)
    before = native.new_kv(LAYERS, 6, 16, shape.kv_heads, shape.head_dim, dtype)
    for kv in before:
        kv.keys.normal_()
        kv.values.normal_()
    results = []
    for run in (run_layers, run_one_by_one):
        cache = native.new_kv(LAYERS, 6, 16, shape.kv_heads, shape.head_dim, dtype)
        for kv, old in zip(cache, before, strict=True):
            kv.keys.copy_(old.keys)
            kv.values.copy_(old.values)
        residual = x.clone()
        for _ in range(2):
            h = run(native, stack, residual, cache, step)
        results.append([h, residual, *(part for kv in cache for part in (kv.keys, kv.values))])
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)
    assert results[0][0].isfinite().all()


def test_arguments_that_do_not_fit_are_refused(native):
    stack, sites = build(native, Shape(), torch.float32)
    slab, slots = loaded(native, sites, torch.float32)
    cache = native.new_kv(LAYERS, 2, 16, 2, 16, torch.float32)
    pages = Pages.of([KVSpan(0, 4, [0])], 16)
    angles = torch.rand(4, 8)
    good = Step(angles, angles, pages, slab, Batch.of([(None, 4)]))
    x = torch.randn(4, 48)
    run_layers(native, stack, x, cache, good)
    bytes_ = Slab(sites, slots=1, size=1 << 16, dtype=torch.int8, layout=native.layout)
    stale = Step(angles, angles, pages, slab, Batch.of([(slots[2], 4)]))
    slab.free(slots[2])
    for wrong_x, step in (
        (torch.randn(5, 48), good),
        (torch.randn(48, 4).T, good),
        (torch.randn(4, 48).bfloat16(), good),
        (x, stale),
        (x, Step(angles, angles, pages, bytes_, Batch.of([(None, 4)]))),
        (x, Step(angles[:, :7], angles, pages, slab, Batch.of([(None, 4)]))),
        (x, Step(angles, angles, pages, slab, Batch.of([(None, 3)]))),
    ):
        with pytest.raises(EngineFault):
            run_layers(native, stack, wrong_x, cache, step)
