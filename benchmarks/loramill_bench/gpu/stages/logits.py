"""The stage logits: the decoder, its kernels and its graphs against transformers in float32."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from loramill.kernels import Batch
from loramill.serve.model import Chunk, load_decoder
from loramill_bench.gpu.bases import (
    GEMMA_2_2B,
    GEMMA_3_4B,
    QWEN3_8B,
    QWEN3_MOE,
    config,
    llama,
    served,
    transformers_config,
)
from loramill_bench.gpu.stage import Context
from loramill_bench.results import Result

#: Tokens of the sequence; those before the last are the prompt, in two pieces, and the others are decoded one by one.
_TOKENS, _PIECES = 200, ((0, 90), (90, 180))


def measure(context: Context) -> Iterator[Result]:
    """The error of the logits of two layers in bfloat16, for bases of several families."""
    two = {"num_hidden_layers": 2, "vocab_size": 4000}
    others = {"qwen3-8b": QWEN3_8B, "gemma-2-2b": GEMMA_2_2B, "gemma-3-4b": GEMMA_3_4B, "qwen3-moe": QWEN3_MOE}
    bases = {"llama-3-1b": llama(context, 1, **two)}
    bases |= {name: config(context, shapes, **two) for name, shapes in others.items()}
    for name, shapes in bases.items():
        yield Result(f"gpu logits {name}: error", _error(context, shapes), "of the logits")


def _error(context: Context, shapes: dict[str, object]) -> float:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    expected_of = AutoModelForCausalLM.from_config(transformers_config(shapes)).float().eval()
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as folder:
        expected_of.save_pretrained(folder)
        model = served(load_decoder(Path(folder), dtype=torch.bfloat16, device=context.device))
    draw = random.Random(1)
    tokens = [draw.randrange(3, model.vocabulary) for _ in range(_TOKENS)]
    with torch.inference_mode():
        expected = expected_of(torch.tensor([tokens])).logits[0]
    cache, slab = model.new_cache(64, 16), model.new_slab(1, 1 << 16)
    blocks = list(range(-(-_TOKENS // 16)))[::-1]
    got = []
    for start, stop in (*_PIECES, *((n, n + 1) for n in range(_PIECES[-1][1], _TOKENS))):
        chunk = Chunk(tokens[start:stop], start, blocks, stop - start)
        got.append(model.forward([chunk], cache, slab, Batch.of([(None, stop - start)])).cpu())
    return float((torch.cat(got) - expected).norm() / expected.norm())
