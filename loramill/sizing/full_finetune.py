"""The bytes of full fine-tuning by DeepSpeed's ZeRO (Rajbhandari et al. 2020) and ZeRO-Offload (Ren et al. 2021)."""

from __future__ import annotations

from loramill.sizing.anatomy import Anatomy
from loramill.sizing.memory import Device, Item, Need, Row, activations, composed, logits_of, one_layer, scratch
from loramill.sizing.targets import Tuning
from loramill.types import JobSpec

#: Bytes a weight: in bf16, its gradient in fp32, and AdamW's copy and two moments in fp32.
_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12
#: Weights whose gradients are on their way together, and those of stage 3 that are on the device at once.
_BUCKET, _LIVE = 50_000_000, 1_000_000_000


def need_full(spec: JobSpec, base: Anatomy, row: Row, device: Device) -> Need:
    """What training all weights needs on the device and, of what is offloaded, in host memory."""
    count = base.parameters
    offload = spec.offload if device == "cuda" else "none"
    held = min(count, _LIVE) if offload == "all" else count
    passing = count if offload == "none" else min(count, max(_BUCKET, base.embedding))
    logits, everything = logits_of(base, row), _everything(base, device)
    needed = composed(
        device,
        [
            Item("base", _WEIGHT * held, "weights in bf16" + (", as many as compute" if offload == "all" else "")),
            Item("optimizer", _OPTIMIZER * count if offload == "none" else 0, "a copy and two moments in fp32"),
        ],
        [
            Item("gradients", _GRADIENT * passing, "in fp32"),
            activations(spec, base, everything, row, device),
            logits,
            scratch(spec, base, everything, row, device, logits),
        ],
        written=_OPTIMIZER * count,
        layer=one_layer(base, everything, row, device, 2),
    )
    host = 0 if offload == "none" else (_GRADIENT + _OPTIMIZER) * count + (_WEIGHT * count) * (offload == "all")
    return Need(needed.items, host)


def _everything(base: Anatomy, device: Device) -> Tuning:
    """All weights: each linear keeps its input, each norm its output, and on a CPU its input in fp32."""
    kept = (2 + 2 + 2 * (device == "cpu")) * base.hidden + base.intermediate
    return Tuning(
        weights=base.parameters,
        fixed=0,
        state=0,
        gradients=base.parameters,
        first=0,
        kept=base.layers * kept,
        most_kept=kept,
        attended=base.layers,
        copied=0,
        most_copied=0,
    )
