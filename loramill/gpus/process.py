"""The GPU of this process."""

from __future__ import annotations

import logging

import torch

from loramill.errors import SetupError
from loramill.gpus import capability_problem, memory_fraction
from loramill.kernels.device import turn_off_cudnn_attention
from loramill.types import GpuInfo

log = logging.getLogger(__name__)


def open_gpu(share: float, device: torch.device | None = None) -> GpuInfo:
    """Checks the GPU of this process, limits torch's allocator to a share of its memory, and selects its attention.

    Ray counts shares of a GPU, and does not limit the memory that a process takes of it.

    Args:
        share: 1 for the whole GPU, which is not limited.
        device: None: the current GPU.

    Raises:
        SetupError: torch finds no GPU, or it is too old.
    """
    if not torch.cuda.is_available():
        raise SetupError(
            "torch finds no GPU in this process. `loramill doctor` shows why; to use the CPU, set serve.device to cpu "
            "and jobs.use_gpu to false."
        )
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if problem := capability_problem(properties.name, capability):
        raise SetupError(problem)
    turn_off_cudnn_attention()
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(memory_fraction(share, properties.total_memory), device)
    info = GpuInfo(name=properties.name, bytes=properties.total_memory, capability=capability)
    log.info("this process uses %.0f%% of %s", 100 * share, info)
    return info


def free_bytes(share: float, device: torch.device) -> int:
    """Memory that this process can still allocate on a GPU of which it has this share."""
    free, total = torch.cuda.mem_get_info(device)
    limit = round(memory_fraction(share, total) * total)
    reserved = torch.cuda.memory_reserved(device)
    unused = reserved - torch.cuda.memory_allocated(device)
    return min(limit - reserved, free) + unused
