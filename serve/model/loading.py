"""Loads a Hugging Face folder's safetensors into a decoder."""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loramill.errors import BaseUnusable, SetupError
from loramill.gpus import FP8_ON_CPU, fp8_problem
from loramill.kernels import Backend, Quantized, Site, Weight, backend
from loramill.kernels.device import turn_off_cudnn_attention
from loramill.kernels.experts import Experts
from loramill.kernels.layers import Layer, Linear, Mlp, Stack
from loramill.kernels.quantization import (
    Nf4Source,
    ServedQuantization,
    concatenate,
    nf4_without_cache,
    quantize,
    unpack_nf4,
)
from loramill.serve.model.config import DecoderConfig, ExpertsConfig, read_config
from loramill.serve.model.decoder import Decoder, DecoderWeights
from loramill.serve.model.graphs import GraphedDecoder
from loramill.serve.model.protocol import Model

#: Number of elements that are read at once.
_PIECE = 4 << 20
#: Tensors in old checkpoints that are not needed.
_IGNORED = ("rotary_emb.inv_freq",)

#: Reads a linear by name, d_out and d_in.
ReadLinear = Callable[[str, int, int], Quantized | torch.Tensor]

log = logging.getLogger(__name__)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: ServedQuantization = "none",
    threads: int | None = None,
    device: str = "cpu",
    nf4_source: Nf4Source = nf4_without_cache,
) -> Model:
    """Loads any base: as a decoder if that supports the architecture, else through transformers, which is slower.

    On a GPU only the decoder is supported; with Triton's kernels its decodes are replayed from graphs.

    Args:
        folder: A Hugging Face model.
        dtype: bfloat16 or float32, whatever the files contain.
        quantization: Of the layers' linears; embedding, head and norms stay in `dtype`.
        threads: Number of CPU threads, for the whole process; None: unchanged.
        device: "cpu" or "cuda", for weights and steps.
        nf4_source: Returns a module's weight in NF4 on the device, from a cache or quantized.

    Raises:
        BaseUnusable: Neither can serve it.
        SetupError: NF4 was requested, and bitsandbytes isn't installed; or there is no GPU, or one without float8.
    """
    try:
        read_config(folder)
    except BaseUnusable as reason:
        if device != "cpu":
            raise BaseUnusable(f"{reason.message} Bases loaded through transformers run on the CPU alone.") from reason
        if quantization == "fp8":
            raise SetupError(FP8_ON_CPU) from reason
        from loramill.serve.model.hf import load_hf

        loaded = load_hf(folder, dtype=dtype, quantization=quantization, threads=threads, nf4_source=nf4_source)
        log.info("base loaded through transformers: %s", reason.message)
        return loaded
    decoder = load_decoder(
        folder, dtype=dtype, quantization=quantization, threads=threads, device=device, nf4_source=nf4_source
    )
    log.info("base loaded by the decoder: %s", folder)
    if device != "cuda" or backend(device).name != "triton":
        return decoder
    if not decoder.capturable:
        log.warning(
            "decodes of this mixture of experts run without CUDA graphs: torch has a kernel for all experts only "
            "for compute capability 9.x and 10.x, in bfloat16"
        )
        return decoder
    return GraphedDecoder(decoder)


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: ServedQuantization = "none",
    threads: int | None = None,
    device: str = "cpu",
    nf4_source: Nf4Source = nf4_without_cache,
) -> Decoder:
    """Loads a base of a family that the decoder supports, in little more memory than it needs afterwards.

    Args:
        folder: config.json and *.safetensors, sharded or not.
        dtype: bfloat16 or float32, whatever the files contain.
        quantization: Of the layers' linears; embedding, head and norms stay in `dtype`, as in transformers.
        threads: Number of CPU threads, for the whole process; None: unchanged.
        device: "cpu" or "cuda", for weights and steps.
        nf4_source: Returns a module's weight in NF4 on the device, from a cache or quantized.

    Raises:
        BaseUnusable: Files are missing or broken, or the decoder lacks a feature of the architecture.
        SetupError: NF4 was requested, and bitsandbytes isn't installed; or there is no GPU, or one without float8.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("torch finds no CUDA device on this machine; serve on the CPU, or use a machine that has one.")
    if quantization == "fp8":
        _check_fp8(device)
    if device == "cuda":
        turn_off_cudnn_attention()
    config = read_config(folder)
    ops = backend(device)
    if threads is not None:
        ops.set_threads(threads)
    try:
        tensors = Tensors(folder, dtype, device)
        read = partial(read_linear, tensors, quantization, nf4_source)
        weights, sites = build_weights(config, tensors, ops, read)
    except (OSError, SafetensorError) as error:
        raise BaseUnusable(f"The weights in {folder} can't be read ({error}); fetch them again.") from error
    tensors.refuse_leftovers()
    return Decoder(config, weights, sites, ops)


def _check_fp8(device: str) -> None:
    """Checks whether a device multiplies matrices in float8.

    Raises:
        SetupError: It does not.
    """
    if device != "cuda":
        raise SetupError(FP8_ON_CPU)
    if problem := fp8_problem(torch.cuda.get_device_name(), torch.cuda.get_device_capability()):
        raise SetupError(problem)


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


class Tensors:
    """The folder's tensors by name; keeps track of those that have been read."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        """
        Args:
            folder: A Hugging Face folder.
            dtype: The dtype in which tensors are returned.
            device: The device on which tensors are returned.
        """
        self.dtype = dtype
        self.device = device
        self._folder = folder
        self._owners: dict[str, Path] = {}
        for path in _weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self._owners |= dict.fromkeys(file.keys(), path)
        self._left = set(self._owners)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Reads a tensor of this shape.

        Raises:
            BaseUnusable: The folder has no such tensor, or it has another shape.
        """
        if name not in self._owners:
            raise BaseUnusable(f"The weights in {self._folder} lack '{name}', which config.json requires.")
        taken = torch.empty(shape, dtype=self.dtype, device=self.device)
        rows = max(1, _PIECE * shape[0] // taken.numel())
        for start in range(0, shape[0], rows):
            # The pages read from a mapped file count as this process's memory until the file is closed.
            with safe_open(self._owners[name], framework="pt") as file:
                piece = file.get_slice(name)
                if tuple(piece.get_shape()) != shape:
                    raise BaseUnusable(
                        f"'{name}' in {self._folder} is {piece.get_shape()}; by config.json it should be {list(shape)}."
                    )
                taken[start : start + rows] = piece[start : start + rows]
        self._left.discard(name)
        return taken

    def skip(self, name: str) -> None:
        """Marks a tensor as used without reading it."""
        self._left.discard(name)

    def refuse_leftovers(self) -> None:
        """Checks that every tensor was used.

        Raises:
            BaseUnusable: One was not.
        """
        left = sorted(name for name in self._left if not name.endswith(_IGNORED))
        if left:
            raise BaseUnusable(
                f"The weights in {self._folder} contain '{left[0]}' ({len(left)} in all), which the decoder doesn't "
                "use: config.json describes another model."
            )


def read_linear(
    tensors: Tensors, quantization: ServedQuantization, nf4_source: Nf4Source, name: str, d_out: int, d_in: int
) -> Quantized | torch.Tensor:
    """Reads a linear's weight [d_out, d_in] and quantizes it; a weight in NF4 may come from a cache instead."""
    read = partial(tensors.take, f"{name}.weight", d_out, d_in)
    if quantization == "none":
        return read()
    if quantization != "nf4":
        return quantize(read(), quantization)
    packed = nf4_source(name, read)
    tensors.skip(f"{name}.weight")
    return unpack_nf4(packed)


def build_weights(
    c: DecoderConfig, tensors: Tensors, ops: Backend, read: ReadLinear
) -> tuple[DecoderWeights, list[Site]]:
    """Reads and packs all weights of a decoder.

    Args:
        c: The decoder's config.
        tensors: The tensors of the base.
        ops: The backend that packs the weights.
        read: Reads the layers' linears; `read_linear` without its first three arguments.

    Returns:
        The weights, and the sites at which adapters apply.

    Raises:
        BaseUnusable: A tensor is missing or has another shape.
    """
    # The largest first: the additional memory for packing them is free again before the layers are loaded.
    embedding = ops.pack(tensors.take("model.embed_tokens.weight", c.vocabulary, c.hidden))
    if c.tied:
        tensors.skip("lm_head.weight")
    head = embedding if c.tied else ops.pack(tensors.take("lm_head.weight", c.vocabulary, c.hidden))
    sites: list[Site] = []
    layers: list[Layer] = []
    for index in range(c.layers):
        layers.append(_build_layer(c, tensors, ops, read, index, sites))
        _trim_heap()
    norm = tensors.take("model.norm.weight", c.hidden)
    sites.append(Site(c.vocabulary, ("model.embed_tokens",), (c.hidden,), lookup=True))
    sites.append(Site(c.hidden, ("lm_head",), (c.vocabulary,), head=True))
    # None for the default, so that a backend may run all layers in one call.
    scale = None if c.attention_scale == c.head_dim**-0.5 else c.attention_scale
    stack = Stack(tuple(layers), norm, c.heads, c.norm_eps, c.norm_offset, c.activation, scale, c.attention_cap)
    return DecoderWeights(embedding, len(sites) - 2, stack, Linear(head, None, len(sites) - 1)), sites


def _build_layer(
    c: DecoderConfig, tensors: Tensors, ops: Backend, read: ReadLinear, index: int, sites: list[Site]
) -> Layer:
    prefix = f"model.layers.{index}"

    def fuse(parent: str, d_in: int, widths: dict[str, int]) -> Linear:
        names = [f"{prefix}.{parent}.{part}" for part in widths]
        sites.append(Site(d_in, tuple(names), tuple(widths.values())))
        weights: list[Quantized | torch.Tensor] = []
        biases: list[torch.Tensor] = []
        for name, (part, width) in zip(names, widths.items(), strict=True):
            weights.append(read(name, width, d_in))
            if part in c.biased:
                biases.append(tensors.take(f"{name}.bias", width))
        # An architecture has a bias at all parts of a fused linear or at none.
        packed = _pack(weights, tensors.dtype, ops)
        return Linear(packed, torch.cat(biases) if biases else None, len(sites) - 1)

    def norm(name: str, width: int = c.hidden) -> torch.Tensor:
        return tensors.take(f"{prefix}.{name}.weight", width)

    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    qkv = fuse("self_attn", c.hidden, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
    o = fuse("self_attn", queries, {"o_proj": c.hidden})
    mlp: Mlp | Experts
    if c.experts is not None and c.experts.layers[index]:
        mlp = _build_experts(c.experts, c.hidden, tensors, ops, f"{prefix}.mlp")
    else:
        gate_up = fuse("mlp", c.hidden, {"gate_proj": c.intermediate, "up_proj": c.intermediate})
        mlp = Mlp(gate_up, fuse("mlp", c.intermediate, {"down_proj": c.hidden}))
    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=qkv,
        q_norm=norm("self_attn.q_norm", c.head_dim) if c.qk_norm else None,
        k_norm=norm("self_attn.k_norm", c.head_dim) if c.qk_norm else None,
        o=o,
        post_norm=norm("pre_feedforward_layernorm" if c.output_norms else "post_attention_layernorm"),
        mlp=mlp,
        window=c.windows[index],
        attention_norm=norm("post_attention_layernorm") if c.output_norms else None,
        mlp_norm=norm("post_feedforward_layernorm") if c.output_norms else None,
    )


def _build_experts(c: ExpertsConfig, hidden: int, tensors: Tensors, ops: Backend, prefix: str) -> Experts:
    gate_up = torch.empty(c.count, 2 * c.intermediate, hidden, dtype=tensors.dtype, device=tensors.device)
    down = torch.empty(c.count, hidden, c.intermediate, dtype=tensors.dtype, device=tensors.device)
    for expert in range(c.count):
        name = f"{prefix}.experts.{expert}"
        gate_up[expert, : c.intermediate] = tensors.take(f"{name}.gate_proj.weight", c.intermediate, hidden)
        gate_up[expert, c.intermediate :] = tensors.take(f"{name}.up_proj.weight", c.intermediate, hidden)
        down[expert] = tensors.take(f"{name}.down_proj.weight", hidden, c.intermediate)
    router = ops.pack(tensors.take(f"{prefix}.gate.weight", c.count, hidden))
    return Experts(router, ops.pack_experts(gate_up), ops.pack_experts(down), c.top_k, c.normalized)


def _trim_heap() -> None:
    """Returns free pages to the system: glibc would keep some after each layer's temporary tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _pack(weights: list[Quantized | torch.Tensor], dtype: torch.dtype, ops: Backend) -> Weight:
    """Fuses the weights of modules that read the same x, one below the other."""
    if codes := [weight for weight in weights if isinstance(weight, Quantized)]:
        return ops.pack_quantized(concatenate(codes), dtype)
    return ops.pack(torch.cat([weight for weight in weights if isinstance(weight, torch.Tensor)]).to(dtype))
