"""Which globs match an adapter together: the names are right, and no combination of short names is missing."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from loramill.names import AdapterName
from loramill.pipelines.nightly.definition.combinations import TooManyCombinations, combinations
from loramill.pipelines.nightly.definition.fields import Glob
from loramill.pipelines.nightly.definition.schema import matches


def is_glob(text: str) -> bool:
    """Whether a definition takes it; one with a slash in brackets is refused."""
    try:
        TypeAdapter(Glob).validate_python(text)
    except ValidationError:
        return False
    return True


token = st.sampled_from(["a", "b", "-", "*", "?", "[ab]", "[!a]", "[!ab]", "[", "[]a]", "[a-c]"])
part = st.lists(token, min_size=1, max_size=4).map("".join)
pair = st.tuples(part, part).map("/".join).filter(is_glob)
glob = st.one_of(st.just("*"), pair)
groups = st.lists(st.lists(glob, min_size=1, max_size=2), max_size=4)

_PARTS = ["".join(each) for length in (1, 2, 3) for each in product("abcd-", repeat=length)]
NAMES = [each for each in _PARTS if each[0] != "-" and each[-1] != "-"]


def matching(name: str, listed: list[list[str]]) -> tuple[int, ...]:
    return tuple(number for number, globs in enumerate(listed) if matches(name, globs))


@settings(deadline=None)
@given(listed=groups)
def test_each_combination_has_an_adapter_that_exactly_its_groups_match(listed: list[list[str]]) -> None:
    for numbers, name in combinations(listed).items():
        assert str(AdapterName.parse(name)) == name
        assert matching(name, listed) == numbers


@settings(deadline=None, max_examples=40)
@given(listed=groups, tenants=st.lists(st.sampled_from(NAMES), min_size=1, max_size=20))
def test_no_combination_is_missing(listed: list[list[str]], tenants: list[str]) -> None:
    found = combinations(listed)
    assert {matching(f"{tenant}/{adapter}", listed) for tenant in tenants for adapter in NAMES} <= found.keys()


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ([], {()}),
        ([["*"]], {(0,)}),
        ([["acme/*"], ["*/legal"]], {(), (0,), (1,), (0, 1)}),
        ([["acme/*"], ["bolt/*"]], {(), (0,), (1,)}),
        ([["a/*c"], ["a/b*"], ["a/bc"]], {(), (0,), (1,), (0, 1), (0, 1, 2)}),
        ([["a/x"], ["*/*"]], {(1,), (0, 1)}),
        ([["A/b"], ["a/-b"], ["a/" + "b" * 65]], {()}),  # names of no adapter
        ([["a/" + "b" * 64]], {(), (0,)}),
    ],
)
def test_combinations_of_globs(listed: list[list[str]], found: set[tuple[int, ...]]) -> None:
    assert combinations(listed).keys() == found


def test_many_adapters_by_name_are_listed() -> None:
    listed = [[f"tenant-{number}/adapter-{number}"] for number in range(200)]
    assert combinations(listed).keys() == {(), *((number,) for number in range(200))}


def test_too_many_combinations_are_refused() -> None:
    with pytest.raises(TooManyCombinations):
        combinations([[f"*{a}*{b}*/x"] for a, b in product("abcdef", repeat=2)])
