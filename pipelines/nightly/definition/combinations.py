"""Which groups of globs match an adapter together, over all adapters that could exist. Pure functions.

A part of a glob, the tenant's or the adapter's, is a small automaton; those of all globs run over the same name
together, in the bits of one number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise, product
from string import ascii_lowercase, digits

#: Characters that a name begins and ends with, and all of them; at most 64 make a name (`loramill.names`).
_ENDS = ascii_lowercase + digits
_CHARACTERS = _ENDS + "-_."
_LONGEST = 64
#: Globs with several `*` each may match in more combinations than can be checked in minutes: above this number of
#: states (about a second), or of pairs of a tenant's and an adapter's matches, it stops.
MAX_STATES = 20_000
MAX_PAIRS = 1_000_000


class TooManyCombinations(Exception):
    """Globs match together in more ways than can be listed."""


def combinations(groups: Sequence[Sequence[str]]) -> dict[tuple[int, ...], str]:
    """Returns the numbers of the groups that match an adapter together, each set of them with an adapter's name.

    Args:
        groups: globs over `tenant/adapter`, or `*`; a group matches if one of its globs does.

    Raises:
        TooManyCombinations: there are too many to list.
    """
    globs = [(glob if "/" in glob else "*/*").split("/") for group in groups for glob in group]
    tenants, adapters = (_matches([glob[part] for glob in globs]) for part in (0, 1))
    if len(tenants) * len(adapters) > MAX_PAIRS:
        raise TooManyCombinations
    ends = [0]
    for group in groups:
        ends.append(ends[-1] + len(group))
    members = [(1 << end) - (1 << start) for start, end in pairwise(ends)]
    names: dict[int, str] = {}
    for (tenant, first), (adapter, second) in product(tenants.items(), adapters.items()):
        names.setdefault(tenant & adapter, f"{first}/{second}")
    found: dict[tuple[int, ...], str] = {}
    for matched, name in names.items():
        found.setdefault(tuple(number for number, own in enumerate(members) if matched & own), name)
    return found


def _matches(globs: Sequence[str]) -> dict[int, str]:
    """Which globs match a name together, as the bits of a number, each with the shortest such name."""
    machine = _compile(globs)
    letters = _letters(machine)
    ends = {character for character in letters if character in _ENDS}
    found: dict[int, str] = {}
    level, seen = {machine.start: ""}, {machine.start}
    for length in range(_LONGEST):
        following: dict[int, str] = {}
        for state, name in level.items():
            for character in ends if not length else letters:
                after = machine.step(state, character)
                if character in ends:
                    found.setdefault(after & machine.accepts, name + character)
                if after not in seen:
                    seen.add(after)
                    following[after] = name + character
        if len(seen) > MAX_STATES:
            raise TooManyCombinations
        level = following
    return {machine.matched(state): name for state, name in found.items()}


@dataclass(frozen=True, slots=True)
class _Machine:
    """Globs as one automaton: bit n of a state is set if a glob may be before its character n.

    Attributes:
        start: the first state.
        moves: for each character, the bits at which a glob has it.
        stays: the bits at which a glob has a `*`.
        accepts: the bits at the ends of globs.
        ends: the bit at the end of each glob.
    """

    start: int
    moves: dict[str, int]
    stays: int
    accepts: int
    ends: tuple[int, ...]

    def step(self, state: int, character: str) -> int:
        """The state after a character."""
        return (state & self.moves[character]) << 1 | state & self.stays

    def matched(self, state: int) -> int:
        """The globs that match if the name ends here, as the bits of a number."""
        return sum(1 << number for number, bit in enumerate(self.ends) if state & bit)


def _compile(globs: Sequence[str]) -> _Machine:
    start, stays, ends = 0, 0, []
    moves = dict.fromkeys(_CHARACTERS, 0)
    bit = 1
    for glob in globs:
        start |= bit
        for token in tokens(glob):
            if token == "*":
                stays |= bit
                continue
            for character in _CHARACTERS:
                if fnmatchcase(character, token):
                    moves[character] |= bit
            bit <<= 1
        ends.append(bit)
        bit <<= 1
    return _Machine(start, moves, stays, sum(ends), tuple(ends))


def _letters(machine: _Machine) -> list[str]:
    """One of all characters that no glob tells apart; one that a name may end with, where there is such."""
    chosen: dict[int, str] = {}
    for character in _CHARACTERS:
        chosen.setdefault(machine.moves[character], character)
    return list(chosen.values())


def tokens(glob: str) -> Iterator[str]:
    """The parts of a glob that stand for one character, and `*`; brackets are read as `fnmatch` reads them."""
    at = 0
    while at < len(glob):
        end = at + 1
        if glob[at] == "[":
            first = at + 2 if glob[at + 1 : at + 2] == "!" else at + 1
            closing = glob.find("]", first + 1)
            end = closing + 1 if closing >= 0 else at + 1
        # A bracket that is not closed stands for itself.
        yield "[[]" if glob[at:end] == "[" else glob[at:end]
        at = end
