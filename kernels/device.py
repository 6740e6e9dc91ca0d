"""A device of this process: its errors, its memory, and which of torch's kernels it uses."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a GPU library only means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # Memory that is not the allocator's, such as that of a CUDA graph or of cuBLAS.
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    return "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def device_works(device: torch.device) -> bool:
    """Whether a device still computes. After an illegal access, a device-side assert or an ECC error, CUDA does not."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def turn_off_cudnn_attention() -> None:
    """Keeps torch from cuDNN's attention, for the whole process.

    cuDNN makes a plan for each new length, in about 0.4 s forward and 0.5 s backward, and almost every prompt and
    training pass has a new length. torch prefers cuDNN on Hopper and Blackwell from 2.11 on.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def free_cached_memory(device: torch.device) -> None:
    """Returns the allocator's unused memory to the device, in which other sizes then fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
