"""Runs passes over the base for several adapters at once. Each adapter's results are those that it would have alone.

An adapter's rows meet no other's: attention and loss are computed part by part, the adapter's products take its own
rows, and everything else is computed row by row. Products with the base's weights give a row the same bits whatever the
other rows are, from four rows (measured on AVX-512: oneDNN in bfloat16 with any number of threads, MKL in float32 with
one). There, results are equal to the bit; elsewhere they are equal up to the rounding of these products.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from traceback import clear_frames
from typing import Any

import torch
from transformers import PreTrainedModel

from loramill.jobs.train.engine.parts import Part, T, Together, Work
from loramill.jobs.train.forward import is_memory_error, predict, recomputed_layers, shares_passes

log = logging.getLogger(__name__)


class TrainingEngine:
    """A base that computes passes for the adapters that are attached to it.

    Args:
        model: the base, within `configured_forward`.

    Attributes:
        max_tokens: limit of a pass with several parts: half the tokens of the smallest one that ran out of memory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.max_tokens = sys.maxsize

    @property
    def shares_passes(self) -> bool:
        """Whether a pass may have parts of several adapters."""
        return shares_passes(self._model)

    def run(self, parts: Sequence[Part]) -> list[torch.Tensor | Exception]:
        """Runs one pass; several if it fails, so that only parts that fail alone are affected.

        Args:
            parts: at most one per adapter, all for training or none.

        Returns:
            Per part what its loss returned to be added up, in float64, or the error of its pass. Gradients are then
            complete or, of a part with an error, arbitrary.
        """
        try:
            return list(self._run_pass(parts))
        except Exception as error:  # noqa: BLE001 - whatever it is, the owner of the part gets it
            clear_frames(error.__traceback__)  # frees the activations, whose memory the next passes need
            if len(parts) == 1:
                return [error]
            log.warning("a pass of %d adapters failed; computing it in two: %r", len(parts), error)
            if is_memory_error(error):
                self.max_tokens = min(self.max_tokens, sum(part.tokens for part in parts) // 2)
        middle = len(parts) // 2
        return self.run(parts[:middle]) + self.run(parts[middle:])

    def complete(self, work: Work[T]) -> T:
        """Runs the passes of one client alone, and returns the result of its work, which does nothing together."""
        result: Any
        try:
            waits_for = next(work)
            while True:
                assert not isinstance(waits_for, Together)
                if isinstance(waits_for, Part):
                    [result] = self.run([waits_for])
                else:
                    result = waits_for.exception() or waits_for.result()
                waits_for = work.throw(result) if isinstance(result, BaseException) else work.send(result)
        except StopIteration as end:
            value: T = end.value
            return value

    def _run_pass(self, parts: Sequence[Part]) -> Sequence[torch.Tensor]:
        training = parts[0].training
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(training))
            for part in parts:
                part.adapter.set_dropout(part.dropout_key)
                stack.callback(part.adapter.set_dropout, None)
            if (rows := parts[0].adapter.rows) is not None:
                rows.body = tuple((part.slot, part.tokens) for part in parts)
                rows.head = tuple((part.slot, len(part.rows.labels)) for part in parts)
                stack.callback(rows.clear)
            stack.enter_context(recomputed_layers(self._model, any(part.recompute for part in parts)))
            outcomes = self._losses(parts)
            if training:
                _add_gradients(parts, [loss for loss, _ in outcomes])
        return [sums.double() for _, sums in outcomes]

    def _losses(self, parts: Sequence[Part]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # In a function of its own, since the logits must not be kept during the backward pass.
        predictions = predict(parts[0].adapter.model, self._model, [part.rows for part in parts])
        return [part.loss(found) for part, found in zip(parts, predictions, strict=True)]


def _add_gradients(parts: Sequence[Part], losses: list[torch.Tensor]) -> None:
    """Adds the gradients of each part's loss to those of its adapter: of all parts, or of none if memory runs out."""
    if len(parts) == 1:
        (parts[0].backward or torch.autograd.backward)(losses[0])
        return
    weights = [weight for part in parts for weight in part.adapter.weights.values()]
    found = torch.autograd.grad(losses, weights, allow_unused=True)
    # Fused AdamW reads a gradient as if it had the weight's strides; PiSSA's are slices. All memory is allocated before
    # the first gradient is added.
    gradients = [each if each is None else each.contiguous() for each in found]
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
