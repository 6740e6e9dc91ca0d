"""What clients of the engine request: passes over examples of their adapter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from loramill.jobs.train.batching import PackedRows
from loramill.jobs.train.context import never_stop
from loramill.jobs.train.forward import Predictions
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.kernels.batch import Slot

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Examples of one adapter that are computed in one pass, alone or next to parts of other adapters.

    Attributes:
        adapter: the adapter. A training part adds to the gradients of its weights.
        rows: the examples.
        loss: takes the predictions at the supervised tokens; returns the loss, with a gradient, and what the client
            adds up over the parts of a step, float [n].
        training: whether gradients are computed.
        base_only: compute without the adapter.
        recompute: compute activations again in the backward pass instead of keeping them.
        dropout_key: from which the masks of the adapter's dropout follow; None: no dropout.
        backward: takes the loss and computes its gradients, instead of `torch.autograd`; such a part has its pass for
            itself.
        raise_if_stopped: called before each pass while the part waits; if it raises, the client gets its error, and the
            part is not computed.
    """

    adapter: AdaptedModel
    rows: PackedRows
    loss: Callable[[Predictions], tuple[torch.Tensor, torch.Tensor]]
    training: bool
    base_only: bool = False
    recompute: bool = False
    dropout_key: int | None = None
    backward: Callable[[torch.Tensor], None] | None = None
    raise_if_stopped: Callable[[], None] = never_stop

    @property
    def tokens(self) -> int:
        """Number of tokens, with padding."""
        return self.rows.tokens.numel()

    @property
    def slot(self) -> Slot | None:
        """The slot whose adapter the rows get."""
        return None if self.base_only else self.adapter.slot


@dataclass(frozen=True, slots=True)
class Together:
    """Works of one client that are done at the same time, at least one, each with an adapter of its own."""

    works: Sequence[Work[Any]]


#: Work of a client that ends in a T. It yields the parts that it needs, one after another, and is sent for each the
#: second value of its loss, float64; an error of the pass is raised in it. It yields a future for what takes long and
#: needs no pass, such as reading data, and is sent the future's result. To a driver it may also yield works to do
#: together, and is sent for each its result or the error that ended it, once all have ended.
Work = Generator[Part | Future[Any] | Together, Any, T]
