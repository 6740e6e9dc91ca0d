"""Random bases with the shapes of real ones, and adapters for them."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loramill.kernels import backend
from loramill.kernels.quantization import ServedQuantization, nf4_linear, nf4_without_cache, pack_nf4
from loramill.serve.model import Decoder, Model, loading, read_config
from loramill.serve.model.graphs import GraphedDecoder
from loramill.sizing.anatomy import llama_of
from loramill_bench.gpu.stage import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What a dry run changes in a config.
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500,
}  # fmt: skip
#: Memory of a GPU that holds Llama-3-8B in bfloat16 with the caches of the engine's cases.
_LARGE = 44 << 30

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
}  # fmt: skip

#: Gemma 2 2B and Gemma 3 4B, with a window that the stage's sequence exceeds.
GEMMA_2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "vocab_size": 256000, "sliding_window": 64,
}  # fmt: skip
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
    "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 262208, "sliding_window": 64, "sliding_window_pattern": 2,
}  # fmt: skip
#: Qwen3 30B A3B with 16 of its 128 experts, which are enough to compare.
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def llama(context: Context, billions: float = 8, **changes: Any) -> dict[str, Any]:
    """The config of a Llama 3 of this size; a tiny one for a dry run."""
    return config(context, {**llama_of(billions), "rope_theta": 500000.0, "rms_norm_eps": 1e-5}, **changes)


def config(context: Context, shapes: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A config with these shapes; with tiny ones for a dry run."""
    own = {**shapes, "max_position_embeddings": 16384, "torch_dtype": "bfloat16"}
    own.setdefault("head_dim", own["hidden_size"] // own["num_attention_heads"])
    return {**own, **(_TINY if context.dry else {}), **changes}


def served_billions() -> float:
    """The size of the Llama that this GPU serves with the caches of the engine's cases."""
    large = not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory > _LARGE
    return 8 if large else 1


class _RandomTensors(loading.Tensors):
    """Stands in for the files of a base."""

    def __init__(self, device: str) -> None:
        self.dtype = torch.bfloat16
        self.device = device

    def take(self, name: str, *shape: int) -> torch.Tensor:
        taken = torch.empty(shape, dtype=self.dtype, device=self.device)
        return taken.fill_(1.0) if len(shape) == 1 else taken.normal_(std=float(shape[-1]) ** -0.5)

    def skip(self, name: str) -> None:
        """Nothing was to be read."""


def random_decoder(context: Context, shapes: Mapping[str, Any], quantization: ServedQuantization = "none") -> Decoder:
    """A decoder in bfloat16 with random weights, on the context's device."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shapes), encoding="utf-8")
        parsed = read_config(Path(folder))
    ops = backend(context.device)
    tensors = _RandomTensors(context.device)
    read = partial(loading.read_linear, tensors, quantization, nf4_without_cache)
    weights, sites = loading.build_weights(parsed, tensors, ops, read)
    return Decoder(parsed, weights, sites, ops)


def served(decoder: Decoder) -> Model:
    """The decoder as an engine runs it: its decodes in graphs, if it is on a GPU."""
    return GraphedDecoder(decoder) if decoder.device.type == "cuda" and decoder.capturable else decoder


def random_trainable(context: Context, shapes: Mapping[str, Any], *, packed: bool) -> PreTrainedModel:
    """A frozen base in bfloat16 with random weights, as a job trains on it.

    Args:
        packed: whether its linears are in NF4.
    """
    from transformers import AutoModelForCausalLM

    with torch.device(context.device):
        model = AutoModelForCausalLM.from_config(transformers_config(shapes), dtype=torch.bfloat16)
    if packed:
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, nf4_linear(module, pack_nf4(module.weight)))
    return model.requires_grad_(False).eval()


def transformers_config(shapes: Mapping[str, Any]) -> Any:
    """The config as transformers has it."""
    from transformers import AutoConfig

    options = {name: value for name, value in shapes.items() if name not in ("model_type", "torch_dtype")}
    return AutoConfig.for_model(shapes["model_type"], **options)


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed, which NF4 needs."""
    return importlib.util.find_spec("bitsandbytes") is not None
