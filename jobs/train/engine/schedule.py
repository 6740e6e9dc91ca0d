"""Which of the waiting parts share the next pass: a pure decision."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


def level_served(served: Mapping[str, int], waiting: Collection[str]) -> dict[str, int]:
    """The tokens served to the tenants that wait for a pass, each of which starts level with the least served.

    A tenant that waited for none has no claim to the passes meanwhile, and one that left is forgotten.

    Args:
        served: of the tenants that waited for the pass before.
        waiting: tenants that wait for the next pass.
    """
    least = min((served[tenant] for tenant in waiting if tenant in served), default=0)
    return {tenant: served.get(tenant, least) for tenant in waiting}


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
