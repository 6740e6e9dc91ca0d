"""The memory of full fine-tuning by DeepSpeed's ZeRO (Rajbhandari et al. 2020) and ZeRO-Offload (Ren et al. 2021)."""

from __future__ import annotations

from loramill.sizing.anatomy import Anatomy
from loramill.sizing.memory import MemoryEstimate, total
from loramill.sizing.passes import Device, MemoryItem, MemoryRow, activations, one_layer, scratch, whole_logits
from loramill.sizing.targets import TrainedElements
from loramill.types import JobSpec

#: Bytes per weight: in bf16, its gradient in fp32, and AdamW's copy and two moments in fp32.
_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12
#: Number of weights whose gradients are transferred together, and of weights on the device at once in stage 3.
_BUCKET, _LIVE = 50_000_000, 1_000_000_000


def estimate_full(spec: JobSpec, base: Anatomy, row: MemoryRow, device: Device) -> MemoryEstimate:
    """What training all weights needs on the device and, of what is offloaded, in host memory."""
    count = base.parameters
    offload = spec.offload if device == "cuda" else "none"
    held = min(count, _LIVE) if offload == "all" else count
    passing = count if offload == "none" else min(count, max(_BUCKET, base.embedding_weights))
    logits, everything = whole_logits(base, row), _everything(base, device)
    needed = total(
        device,
        [
            MemoryItem(
                "base", _WEIGHT * held, "weights in bf16" + (", as many as compute" if offload == "all" else "")
            ),
            MemoryItem("optimizer", _OPTIMIZER * count if offload == "none" else 0, "a copy and two moments in fp32"),
        ],
        [
            MemoryItem("gradients", _GRADIENT * passing, "in fp32"),
            activations(spec, base, everything, row, device),
            logits,
            scratch(spec, base, everything, row, device, logits),
        ],
        checkpoint_bytes=_OPTIMIZER * count,
        layer_bytes=one_layer(base, everything, row, device, 2),
    )
    host = 0 if offload == "none" else (_GRADIENT + _OPTIMIZER) * count + (_WEIGHT * count) * (offload == "all")
    return MemoryEstimate(needed.items, host)


def _everything(base: Anatomy, device: Device) -> TrainedElements:
    """All weights: each linear saves its input, and each norm of transformers its output and its input in fp32."""
    kept = (2 + 2 + 2 * (device == "cpu" or base.llama_like)) * base.hidden + base.intermediate
    return TrainedElements(
        weights=base.parameters,
        frozen=0,
        extra_state=0,
        gradients=base.parameters,
        first_layer=0,
        saved=base.layers * kept,
        max_layer_saved=kept,
        attention_outputs=base.layers,
        cast=0,
        max_layer_cast=0,
    )
