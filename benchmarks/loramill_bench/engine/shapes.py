"""Sizes of a decoder."""

from __future__ import annotations

from loramill.serve.model import Decoder
from loramill_bench.kernels.model import Model


def model_shapes(decoder: Decoder) -> Model:
    """The decoder's dimensions, as the kernel benchmarks take them."""
    c = decoder.config
    return Model(c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.intermediate)


def weight_count(decoder: Decoder) -> int:
    """Number of weights that a step multiplies by, in all linears and the head; norms are negligible."""
    linears = sum(site.d_in * sum(site.widths) for site in model_shapes(decoder).sites)
    return linears + decoder.config.vocabulary * decoder.config.hidden


def kv_bytes(decoder: Decoder) -> int:
    """Bytes per token of keys and values in all layers."""
    c = decoder.config
    return 2 * c.layers * c.kv_heads * c.head_dim * decoder.dtype.itemsize
