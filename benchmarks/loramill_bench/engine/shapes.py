"""A decoder's sizes."""

from __future__ import annotations

from loramill.serve.model import Decoder
from loramill_bench.kernels.model import Model


def shapes(decoder: Decoder) -> Model:
    """Its dimensions, as the kernels' measurements want them."""
    c = decoder.config
    return Model(c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.intermediate)


def weight_count(decoder: Decoder) -> int:
    """Weights that a step multiplies by: of all linears and the head; those of norms are too few to count."""
    linears = sum(site.d_in * sum(site.widths) for site in shapes(decoder).sites)
    return linears + decoder.config.vocabulary * decoder.config.hidden


def kv_bytes(decoder: Decoder) -> int:
    """Bytes of a token's keys and values in all layers."""
    c = decoder.config
    return 2 * c.layers * c.kv_heads * c.head_dim * decoder.dtype.itemsize
