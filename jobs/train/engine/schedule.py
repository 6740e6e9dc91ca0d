"""Which of the waiting parts share the next pass: a pure decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WaitingPart:
    """A part that waits for a pass.

    Attributes:
        tenant: of its job.
        tokens: of the part.
        training: whether gradients are computed.
        alone: the part has its pass for itself.
    """

    tenant: str
    tokens: int
    training: bool
    alone: bool = False


def choose_parts(waiting: Sequence[WaitingPart], served: dict[str, int], max_tokens: int) -> list[int]:
    """Returns the indices of the parts of the next pass, in the order of `waiting`.

    The first part is of the tenant that was served the fewest tokens. Further parts, all for training or none, are
    picked in the same way, with the parts that are already chosen counted as served; one that does not fit is skipped.
    A part marked `alone` is never combined with others.

    Args:
        waiting: at least one part; the parts of a tenant in the order in which they came.
        served: tokens served so far, by tenant; 0 by default.
        max_tokens: maximum of a pass with several parts.
    """
    counts = dict(served)
    left = list(range(len(waiting)))
    chosen: list[int] = []
    tokens = 0
    while left:
        index = min(left, key=lambda each: (counts.get(waiting[each].tenant, 0), each))
        left.remove(index)
        part = waiting[index]
        if chosen and (part.alone or part.training != waiting[chosen[0]].training or tokens + part.tokens > max_tokens):
            continue
        chosen.append(index)
        tokens += part.tokens
        counts[part.tenant] = counts.get(part.tenant, 0) + part.tokens
        if part.alone:
            break
    return sorted(chosen)
