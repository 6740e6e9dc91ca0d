"""How a case is measured, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from loramill.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Result:
    """What one case came to.

    Attributes:
        case: its name; what belongs together begins alike.
        value: medians, or a ratio of medians out of the same rounds.
        unit: of the value, its target and its floor.
        target: what the value must reach; None: the case only informs.
        better: whether low or high values are.
        floor: what the value would be if the bytes in question were only read; None: that makes no sense here.
    """

    case: str
    value: float
    unit: str
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    floor: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value reaches the target; None: there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    @property
    def goal(self) -> str:
        """The target with its direction, such as `<= 0.25`; empty: there is none."""
        return "" if self.target is None else f"{'<=' if self.better == 'lower' else '>='} {self.target:g}"


def measured(
    groups: Mapping[str, Callable[[], list[Result]]], only: str, report: Callable[[str], object]
) -> list[Result]:
    """The results of the groups whose name contains `only`, each of which is reported before it is measured.

    Raises:
        InvalidRequest: that leaves nothing over.
    """
    chosen = {name: measure for name, measure in groups.items() if only in name}
    if not chosen:
        raise InvalidRequest(f"No case has '{only}' in its name; there are {', '.join(groups)}.", param="only")
    results = []
    for name, measure in chosen.items():
        report(name)
        results += measure()
    return results
