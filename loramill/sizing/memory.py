"""The peak memory of a job, item by item.

It is the sum of what is allocated at the peak: the process, the base, the adapter with its optimizer, and one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramill.gpus import CONTEXT_BYTES
from loramill.sizing.anatomy import Anatomy
from loramill.sizing.passes import Device, MemoryItem, MemoryRow, activations, logits_of, one_layer, scratch
from loramill.sizing.targets import TrainedElements, trained_elements
from loramill.types import JobSpec, Quantization

#: Bytes of a weight in NF4: 4 bits, a scale in 8 bits for 64 weights, and one in 32 bits for 256 scales
#: (Dettmers et al. 2023, QLoRA, section 3, double quantization).
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)

#: Memory of a process with torch and transformers, without tensors, after its first step.
_PROCESS = 580 * 10**6

#: Memory that glibc's malloc can't reuse with its default thresholds, which grow to 32 MiB: temporary tensors of a
#: layer leave holes between those that stay. Measured by `loramill-bench train`: a fraction of all activations, and a
#: multiple of a layer's.
_FRAGMENTED_ACTIVATIONS, _FRAGMENTED_LAYERS = 0.18, 4

#: Copies of a checkpoint that safetensors makes: each tensor, all of them in Rust, and those in Python.
_COPIES = 3


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The peak memory of a job; `host_bytes` is memory that DeepSpeed moves from the GPU to the host."""

    items: tuple[MemoryItem, ...]
    host_bytes: int = 0

    @property
    def bytes(self) -> int:
        """The sum of all items."""
        return sum(item.bytes for item in self.items)

    @property
    def tensors(self) -> int:
        """Bytes of torch's tensors: on a GPU, the value of torch.cuda.max_memory_allocated."""
        return sum(item.bytes for item in self.items if item.name not in ("framework", "fragments"))


def estimate(
    spec: JobSpec,
    base: Anatomy,
    quantization: Quantization,
    row: MemoryRow,
    device: Device,
    dtype_bytes: int = 2,
    trained: TrainedElements | None = None,
) -> MemoryEstimate:
    """The memory of a job of any method but "full" on its device.

    Args:
        trained: the result of `trained_elements(spec, base)`, if it is known.

    Raises:
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    trained = trained or trained_elements(spec, base)
    logits = logits_of(base, row, device, dtype_bytes)
    return total(
        device,
        [
            base_weights(base, quantization, device, dtype_bytes),
            MemoryItem("adapter", 4 * (trained.weights + trained.frozen), f"{trained.weights:,} weights in fp32"),
            MemoryItem("optimizer", (8 + 4 * trained.extra_state) * trained.weights, "two moments of AdamW in fp32"),
        ],
        [
            MemoryItem("gradients", 4 * trained.gradients, "in fp32"),
            activations(spec, base, trained, row, device, dtype_bytes),
            logits,
            scratch(spec, base, trained, row, device, logits, quantization, dtype_bytes),
        ],
        checkpoint_bytes=checkpoint_bytes(trained),
        layer_bytes=one_layer(base, trained, row, device, dtype_bytes),
        # A base was loaded in the dtype of its file before it was converted to another.
        hole_bytes=2 * base.parameters if dtype_bytes == 4 else 0,
    )


def total(
    device: Device,
    resident: Sequence[MemoryItem],
    transient: Sequence[MemoryItem],
    *,
    checkpoint_bytes: int,
    layer_bytes: int,
    hole_bytes: int = 0,
    held_bytes: int | None = None,
) -> MemoryEstimate:
    """The memory of a job: resident items, those of a pass and, on a CPU, those of writing a checkpoint.

    Args:
        device: the kind of device.
        resident: items that stay for the whole job.
        transient: items of a pass.
        checkpoint_bytes: size of a checkpoint.
        layer_bytes: activations of one layer.
        hole_bytes: memory that was freed when the base was loaded.
        held_bytes: what other jobs of a session keep of their passes while one writes its checkpoint; None: there are
            no others.
    """
    items = [framework(device), *resident, *transient]
    if device == "cpu":
        sizes = {item.name: item.bytes for item in transient}
        torn = hole_bytes + round(_FRAGMENTED_ACTIVATIONS * sizes["activations"]) + _FRAGMENTED_LAYERS * layer_bytes
        writing = _COPIES * checkpoint_bytes - sum(sizes.values())
        if held_bytes is not None:
            # Copies of checkpoints of this size fill what activations left (measured: 3054 of 3043 MB, 2268 of 2273).
            writing += held_bytes - (torn - hole_bytes)
        items += [
            MemoryItem("fragments", torn, "of freed memory that malloc can't reuse"),
            MemoryItem("checkpoint", max(0, writing), "while it is written"),
        ]
    return MemoryEstimate(tuple(item for item in items if item.bytes))


def checkpoint_bytes(trained: TrainedElements) -> int:
    """Size of a checkpoint in the middle of the training: weights, moments, and what the method keeps."""
    return (12 + 4 * trained.extra_state) * trained.weights + 4 * trained.frozen


def framework(device: Device) -> MemoryItem:
    """The memory of the process before it has tensors."""
    if device == "cpu":
        return MemoryItem("framework", _PROCESS, "the process with its libraries")
    return MemoryItem("framework", CONTEXT_BYTES, "the CUDA context with its libraries")


def base_weights(base: Anatomy, quantization: Quantization, device: Device, dtype_bytes: int = 2) -> MemoryItem:
    """The base's weights in training, and how they are kept."""
    kept = ""
    if quantization != "none":
        kept = "; a CPU keeps the rounded values and the file's" if device == "cpu" else f" in {quantization}"
        if (device, quantization) == ("cuda", "int8"):
            kept = ", rounded to int8 and kept in bfloat16"
    size = base_bytes(base, quantization, device, dtype_bytes)
    return MemoryItem("base", size, f"{_weights(base)}{kept}")


def _weights(base: Anatomy) -> str:
    """The numbers of weights, and of those that compute a token if they are fewer."""
    active = "" if base.experts is None else f", {base.active_parameters / 1e9:.3g}B of them for each token"
    return f"{base.parameters / 1e9:.3g}B weights{active}"


def base_bytes(base: Anatomy, quantization: Quantization, device: Device, dtype_bytes: int = 2) -> int:
    """Bytes of the base's weights in training.

    NF4 is packed on a GPU. A CPU has the rounded values as dense weights in addition to the file's, which stay mapped.
    """
    weights = sum(linear.weights for linear in base.linears)
    whole = base.parameters * dtype_bytes
    if quantization == "none" or (device, quantization) == ("cuda", "int8"):
        return whole
    return whole + weights * dtype_bytes if device == "cpu" else round(whole + weights * (NF4_BYTES - dtype_bytes))
