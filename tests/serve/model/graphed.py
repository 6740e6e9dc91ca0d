"""Helpers of the tests of graphs: a tiny base, and its decodes with and without graphs side by side."""

import json
import random
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from loramill.kernels import Batch, Delta, KVSpan, Pages
from loramill.serve.model import Chunk

VOCABULARY, BLOCK = 61, 16
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "use_sliding_window": True,
    "sliding_window": 21,
    "layer_types": ["sliding_attention", "full_attention"],
}


def write_base(folder, seed=0):
    """A random base with a window in its first layer; returns the folder."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(d_out, d_in):
        return torch.randn(d_out, d_in, generator=draw) / d_in**0.5

    def norm(size):
        return torch.rand(size, generator=draw) + 0.5

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, 32) * 6,
        "lm_head.weight": matrix(VOCABULARY, 32),
        "model.norm.weight": norm(32),
    }
    shapes = {"self_attn.q_proj": (64, 32), "self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32)}
    shapes |= {"self_attn.o_proj": (32, 64), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}
    shapes |= {"mlp.down_proj": (32, 48)}
    norms = {"input_layernorm": 32, "post_attention_layernorm": 32, "self_attn.q_norm": 16, "self_attn.k_norm": 16}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"model.layers.{layer}.{name}.weight": norm(size) for name, size in norms.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter(sites, rank, seed, share=0.7):
    """Deltas at a share of all modules, some with a gain, in float32."""
    draw, deltas = torch.Generator().manual_seed(seed), {}
    for site in sites:
        for module, width in zip(site.modules, site.widths, strict=True):
            a = torch.randn(rank, site.d_in, generator=draw) / (1 if site.lookup else site.d_in**0.5)
            b = torch.randn(width, rank, generator=draw) / rank**0.5
            gain = torch.rand(width, generator=draw) + 0.5
            has, gains = torch.rand(2, generator=draw).tolist()
            if has < share:
                deltas[module] = Delta(a, b, gain if gains < 0.3 and not site.lookup else None, lookup=site.lookup)
    return deltas


@dataclass(eq=False)
class Sequence:
    """Tokens of which all but the last are in the cache; `adapter_id` is None for the base."""

    tokens: list[int]
    adapter_id: int | None
    blocks: list[int] = field(default_factory=list)


class Side:
    """A model with a cache, a slab and loaded adapters."""

    def __init__(self, model, blocks, slots=4):
        self.model = model
        self.cache = model.new_cache(blocks, BLOCK)
        self.slab = model.new_slab(slots, 1 << 20)
        self.slots = {}

    def load(self, adapter_id, deltas):
        if adapter_id in self.slots:
            self.slab.free(self.slots[adapter_id])
        packed = self.slab.pack(deltas)
        self.slots[adapter_id] = self.slab.allocate(packed.bytes)
        self.slab.load(self.slots[adapter_id], packed)

    def forward(self, chunks, owners):
        slots = [None if adapter_id is None else self.slots[adapter_id] for adapter_id in owners]
        batch = Batch.of((slot, len(chunk.tokens)) for slot, chunk in zip(slots, chunks, strict=True))
        return self.model.forward(chunks, self.cache, self.slab, batch)


class Session:
    """Sequences that start, grow and end on both sides alike; every step's logits are compared."""

    def __init__(self, graphed, plain, *, blocks=40, tolerance=2e-5, seed=0):
        self.sides = Side(graphed, blocks), Side(plain, blocks)
        self.random, self.tolerance = random.Random(seed), tolerance
        self.free = list(range(blocks))
        self.random.shuffle(self.free)

    def load(self, adapter_id, rank, seed=0, share=0.7):
        for side in self.sides:
            side.load(adapter_id, adapter(side.model.sites, rank, 100 * adapter_id + seed, share))

    def begin(self, length, adapter_id):
        """A sequence with its prompt in the cache, all but the last token."""
        sequence = Sequence([self.random.randrange(VOCABULARY) for _ in range(length)], adapter_id)
        if length > 1:
            self.check([self.chunk(sequence, 0, length - 1)], [adapter_id])
        return sequence

    def end(self, sequence):
        self.free += sequence.blocks

    def chunk(self, sequence, start, count, wanted=1):
        while len(sequence.blocks) * BLOCK < start + count:
            sequence.blocks.append(self.free.pop())
        return Chunk(sequence.tokens[start : start + count], start, sequence.blocks, wanted)

    def decode(self, sequences):
        """Decodes one token of each sequence."""
        sequences = sorted(sequences, key=lambda s: -1 if s.adapter_id is None else s.adapter_id)
        chunks = [self.chunk(s, len(s.tokens) - 1, 1) for s in sequences]
        logits = self.check(chunks, [s.adapter_id for s in sequences])
        for sequence, row in zip(sequences, logits, strict=True):
            sequence.tokens.append(int(row.argmax()))

    def check(self, chunks, owners):
        got, expected = (side.forward(chunks, owners).cpu() for side in self.sides)
        assert got.dtype == torch.float32
        error = (got - expected).norm(dim=1) / expected.norm(dim=1)
        assert got.shape == expected.shape
        assert error.max() <= self.tolerance, f"rows of {owners} off by {error.tolist()}"
        return expected


def become(target, source):
    """Gives a frozen object the fields of another."""
    for each in fields(target):
        object.__setattr__(target, each.name, getattr(source, each.name))
    vars(target).pop("segments", None)


class TorchPlan:
    """`StaticPlan` for plain torch, whose operations read a batch on the host."""

    def __init__(self, slab, *, rows, rank):
        self.batch, self.slab, self.rows, self.rank = Batch(rows, ()), slab, rows, rank

    def refresh(self, batch):
        ranks = [self.slab.table[:, run.slot.index, :, 3].max() for run in batch.runs]
        assert batch.rows <= self.rows
        assert max(ranks, default=0) <= self.rank
        become(self.batch, Batch(self.rows, batch.runs))


class TorchPages:
    """`StaticPages` for plain torch."""

    def __init__(self, *, rows, blocks, block_size, scratch, device):
        self.rows, self.blocks, self.scratch = rows, blocks, scratch
        self.pages = Pages.of([KVSpan(0, 1, [scratch])] * rows, block_size)
        self.refresh(Pages.of([], block_size))

    def refresh(self, pages):
        pages.check(pages.rows, self.scratch, self.pages.block_size)
        assert len(pages.blocks) <= self.blocks
        missing = self.rows - len(pages.spans)
        become(self.pages, Pages.of([*pages.spans, *[KVSpan(0, 1, [self.scratch])] * missing], pages.block_size))


class Recorder:
    """Runs the function again at each replay, into the same memory; lists the numbers of rows recorded and replayed."""

    def __init__(self):
        self.recorded, self.replayed = [], []

    def __call__(self, run):
        result = run()
        result = result.clone()
        self.recorded.append(len(result))

        def replay():
            self.replayed.append(len(result))
            return result.copy_(run())

        return replay


def statics():
    """A backend's support for graphs in plain torch; `compiling` is whether kernels are only compiled."""
    buffers = SimpleNamespace(StaticPlan=TorchPlan, StaticPages=TorchPages, compiling=False)

    @contextmanager
    def parallel_compilation():
        buffers.compiling = True
        yield
        buffers.compiling = False

    buffers.parallel_compilation = parallel_compilation
    return buffers
