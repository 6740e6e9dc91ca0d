"""From a Hugging Face folder's safetensors to a decoder."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loramill.errors import BaseUnusable
from loramill.kernels import Backend, Site, backend
from loramill.serve.model.config import DecoderConfig, read_config
from loramill.serve.model.decoder import Decoder, Layer, Linear, Weights

#: Tensors that old checkpoints hold and nobody needs.
_IGNORED = ("rotary_emb.inv_freq",)


def load_decoder(folder: Path, *, dtype: torch.dtype, threads: int | None = None) -> Decoder:
    """Loads a base.

    Args:
        folder: config.json and *.safetensors, sharded or not.
        dtype: bfloat16 or float32, whatever the files hold.
        threads: CPU threads of this whole process from now on; None: leave them.

    Raises:
        BaseUnusable: files are missing or broken, or the architecture has something that the decoder lacks.
    """
    config = read_config(folder)
    ops = backend()
    if threads is not None:
        ops.set_threads(threads)
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in _weight_files(folder)]
            owners = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            tensors = _Tensors(folder, owners, dtype)
            weights, sites = _build(config, tensors, ops)
        except (OSError, SafetensorError) as error:
            raise BaseUnusable(f"The weights in {folder} can't be read ({error}); fetch them again.") from error
        tensors.refuse_leftovers()
    return Decoder(config, weights, sites, ops)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseUnusable(f"{index} can't be read ({error!r}); fetch it again.") from error
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BaseUnusable(f"{folder} lacks {', '.join(missing)}; the weights must be there as safetensors.")
    return [folder / name for name in names]


class _Tensors:
    """The folder's tensors by name; remembers which were taken."""

    def __init__(self, folder: Path, owners: dict[str, safe_open], dtype: torch.dtype) -> None:
        self._folder = folder
        self._owners = owners
        self._dtype = dtype
        self._left = set(owners)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self._owners:
            raise BaseUnusable(f"The weights in {self._folder} lack '{name}', which config.json promises.")
        tensor: torch.Tensor = self._owners[name].get_tensor(name)  # type: ignore[no-untyped-call]
        if tuple(tensor.shape) != shape:
            raise BaseUnusable(
                f"'{name}' in {self._folder} is {list(tensor.shape)}; by config.json it should be {list(shape)}."
            )
        self._left.discard(name)
        return tensor.to(self._dtype)

    def skip(self, name: str) -> None:
        self._left.discard(name)

    def refuse_leftovers(self) -> None:
        left = sorted(name for name in self._left if not name.endswith(_IGNORED))
        if left:
            raise BaseUnusable(
                f"The weights in {self._folder} hold '{left[0]}' ({len(left)} in all), which the decoder has no use "
                "for: config.json describes another model."
            )


def _build(c: DecoderConfig, tensors: _Tensors, ops: Backend) -> tuple[Weights, list[Site]]:
    embedding = ops.pack(tensors.take("model.embed_tokens.weight", c.vocabulary, c.hidden))
    sites: list[Site] = []
    layers = tuple(_build_layer(c, tensors, ops, f"model.layers.{index}", sites) for index in range(c.layers))
    norm = tensors.take("model.norm.weight", c.hidden)
    if c.tied:
        tensors.skip("lm_head.weight")
    head = embedding if c.tied else ops.pack(tensors.take("lm_head.weight", c.vocabulary, c.hidden))
    return Weights(embedding, layers, norm, head), sites


def _build_layer(c: DecoderConfig, tensors: _Tensors, ops: Backend, prefix: str, sites: list[Site]) -> Layer:
    def fuse(parent: str, d_in: int, widths: dict[str, int]) -> Linear:
        names = [f"{prefix}.{parent}.{part}" for part in widths]
        sites.append(Site(d_in, tuple(names), tuple(widths.values())))
        weights: list[torch.Tensor] = []
        biases: list[torch.Tensor] = []
        for name, (part, width) in zip(names, widths.items(), strict=True):
            weights.append(tensors.take(f"{name}.weight", width, d_in))
            if part in c.biased:
                biases.append(tensors.take(f"{name}.bias", width))
        # An architecture biases all parts of a fused linear or none.
        return Linear(ops.pack(torch.cat(weights)), torch.cat(biases) if biases else None, len(sites) - 1)

    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return Layer(
        input_norm=tensors.take(f"{prefix}.input_layernorm.weight", c.hidden),
        qkv=fuse("self_attn", c.hidden, {"q_proj": queries, "k_proj": keys, "v_proj": keys}),
        q_norm=tensors.take(f"{prefix}.self_attn.q_norm.weight", c.head_dim) if c.qk_norm else None,
        k_norm=tensors.take(f"{prefix}.self_attn.k_norm.weight", c.head_dim) if c.qk_norm else None,
        o=fuse("self_attn", queries, {"o_proj": c.hidden}),
        post_norm=tensors.take(f"{prefix}.post_attention_layernorm.weight", c.hidden),
        gate_up=fuse("mlp", c.hidden, {"gate_proj": c.intermediate, "up_proj": c.intermediate}),
        down=fuse("mlp", c.intermediate, {"down_proj": c.hidden}),
    )
