"""Results of benchmark cases, and running groups of cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from loramill.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one case.

    Attributes:
        case: Name of the case; it begins with the name of its group.
        value: A median, or a ratio of medians from the same rounds.
        unit: Unit of value, target and floor.
        target: Worst acceptable value; None: the case has no target.
        better: Whether lower or higher values are better.
        floor: The value if the same bytes were only read from memory; None: not applicable.
    """

    case: str
    value: float
    unit: str
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    floor: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value meets the target; None without a target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    @property
    def target_text(self) -> str:
        """The target with its direction, such as `<= 0.25`; empty without a target."""
        return "" if self.target is None else f"{'<=' if self.better == 'lower' else '>='} {self.target:g}"


def run_groups(
    groups: Mapping[str, Callable[[], list[Result]]], only: str, report: Callable[[str], object]
) -> list[Result]:
    """Runs the groups whose name contains `only`; calls `report` with the name of each before it runs.

    Returns:
        The results of all groups, in order.

    Raises:
        InvalidRequest: No group's name contains `only`.
    """
    chosen = {name: measure for name, measure in groups.items() if only in name}
    if not chosen:
        raise InvalidRequest(f"No case has '{only}' in its name; there are {', '.join(groups)}.", param="only")
    results = []
    for name, measure in chosen.items():
        report(name)
        results += measure()
    return results
