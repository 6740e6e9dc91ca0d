"""What the engine does after its model has failed: what the error means, and what is tried again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch

from loramill.kernels.device import device_works, is_out_of_memory


class FailureKind(Enum):
    """What a failure of the model means for the engine."""

    #: The step needs more memory than the device has left; the device works.
    OUT_OF_MEMORY = auto()
    #: Every further call fails: the CUDA context is unusable until the process ends.
    DEVICE_LOST = auto()
    #: Anything else; it concerns the answers of the step.
    STEP = auto()


@dataclass(frozen=True, slots=True)
class ModelFailure:
    """A failure, without the exception: its traceback would keep the tensors of the failed step in memory."""

    kind: FailureKind
    message: str

    @classmethod
    def of(cls, error: Exception, device: torch.device) -> ModelFailure:
        """Classifies what the model raised on a device."""
        if is_out_of_memory(error):
            kind = FailureKind.OUT_OF_MEMORY
        else:
            kind = FailureKind.STEP if device_works(device) else FailureKind.DEVICE_LOST
        return cls(kind, repr(error))


@dataclass(frozen=True, slots=True)
class Recovery:
    """What follows a step for which there was no memory.

    Attributes:
        ended: Index of the chunk whose answer ends; None: no answer ends.
        retried: Indices of the chunks that run again at once. The others are scheduled again in the next step.
    """

    ended: int | None
    retried: tuple[int, ...]


def recover_from_out_of_memory(ids: Sequence[int], decodes: Sequence[bool], *, first: bool) -> Recovery:
    """Decides what is tried again of a step for which there was no memory.

    Decodes take little memory, and a prompt takes much: the newest prompt ends, and the decodes run again alone.

    Args:
        ids: Ids of the chunks' answers; a newer answer has a larger one.
        decodes: Whether each chunk is a decode rather than a part of a prompt.
        first: Whether the step has not been retried yet.
    """
    prompts = [index for index, decode in enumerate(decodes) if not decode]
    running = tuple(index for index, decode in enumerate(decodes) if decode)
    if prompts:
        return Recovery(max(prompts, key=ids.__getitem__), running)
    if first:  # freeing the cached memory may have been enough
        return Recovery(None, running)
    newest = max(running, key=ids.__getitem__)
    return Recovery(newest, tuple(index for index in running if index != newest))
