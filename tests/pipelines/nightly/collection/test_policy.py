"""What is trained on and held out: the rules, over sequences of nightly runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.data.examples import Example
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, dialog, fingerprints
from loramill.pipelines.nightly.collection.policy import Fate, Known, assign, choose_held_out
from loramill.pipelines.nightly.definition import SplitDefinition
from loramill.types import ContentSide

RULES = SplitDefinition()
THRESHOLD = 0.8


def example(question: str, answer: str = "yes") -> Example:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(messages, None, answer, 1)


def sentence(number: int) -> str:
    """A sentence of random letters, unlike all others."""
    letters = random.Random(number)
    return " ".join("".join(letters.choices("abcdefghijklmnop", k=6)) for _ in range(12))


def edited(number: int, at: int) -> str:
    """A sentence with one wrong letter."""
    text = sentence(number)
    return f"{text[:at]}z{text[at + 1 :]}"


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the trigrams of two short texts, written down independently."""
    first, second = ({f"<{text}>"[i : i + 3] for i in range(len(text))} for text in (a, b))
    return len(first & second) / len(first | second)


@dataclass
class History:
    """An adapter over several nightly runs: what was trained on and held out so far."""

    train: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    released: frozenset[str] = frozenset()

    def known(self) -> Known:
        found = {**self.train, **self.held}
        examples = fingerprints([example(text) for text in found.values()])
        sides = [ContentSide.HELD_OUT if digest in self.held else ContentSide.TRAIN for digest in found]
        return Known(examples, sides, [digest not in self.released for digest in found])

    def run(self, train: Sequence[str], valid: Sequence[str] = ()) -> tuple[list[Fate], list[Fate]]:
        new = [fingerprints([example(text) for text in texts]) for texts in (train, valid)]
        fates = assign(new[0], new[1], self.known(), RULES)
        for texts, found, decided in zip((train, valid), new, fates, strict=True):
            for text, each, fate in zip(texts, found, decided, strict=True):
                if fate is Fate.TRAIN:
                    self.train[each.digest] = text
                elif fate is Fate.HELD_OUT:
                    self.held[each.digest] = text
        return fates


def texts(found: Sequence[Fingerprint], fates: Sequence[Fate], fate: Fate) -> set[str]:
    return {each.digest for each, decided in zip(found, fates, strict=True) if decided is fate}


# Sentences, repeated and edited, so that runs share content and near-duplicates.
content = st.tuples(st.integers(0, 8), st.integers(0, 4)).map(
    lambda each: edited(each[0], each[1] * 17) if each[1] else sentence(each[0])
)
nightly_data = st.tuples(st.lists(content, max_size=12), st.lists(content, max_size=3))


@settings(deadline=None)
@given(nightly_runs=st.lists(nightly_data, min_size=1, max_size=4))
def test_no_held_out_example_or_near_duplicate_is_ever_trained(nightly_runs: list[tuple[list[str], list[str]]]) -> None:
    past = History()
    for train, valid in nightly_runs:
        past.run(train, valid)
        assert not past.train.keys() & past.held.keys()
        for held in past.held.values():
            for trained in past.train.values():
                assert similarity(dialog(example(held)), dialog(example(trained))) < THRESHOLD


@settings(deadline=None)
@given(nightly_runs=st.lists(nightly_data, min_size=1, max_size=3))
def test_every_row_has_one_fate_and_only_new_content_has_a_side(
    nightly_runs: list[tuple[list[str], list[str]]],
) -> None:
    past = History()
    for train, valid in nightly_runs:
        before = {*past.train, *past.held}
        fates = past.run(train, valid)
        assert [len(each) for each in fates] == [len(train), len(valid)]
        new = fingerprints([example(text) for text in (*train, *valid)])
        sided = [
            each.digest
            for each, fate in zip(new, [*fates[0], *fates[1]], strict=True)
            if fate in (Fate.TRAIN, Fate.HELD_OUT)
        ]
        assert len(sided) == len(set(sided)) and not before & set(sided)


@settings(deadline=None)
@given(train=st.lists(content, max_size=14, unique=True), order=st.randoms())
def test_the_order_of_examples_changes_nothing(train: list[str], order: random.Random) -> None:
    shuffled = order.sample(train, len(train))
    first, second = History(), History()
    first.run(train)
    second.run(shuffled)
    assert (first.train, first.held) == (second.train, second.held)


@settings(deadline=None)
@given(train=st.lists(content, max_size=14), more=st.lists(content, max_size=6))
def test_released_data_keeps_its_sides(train: list[str], more: list[str]) -> None:
    past = History()
    past.run(train)
    sides = (dict(past.train), dict(past.held))
    past.released = frozenset({*past.train, *past.held})
    fates, _ = past.run([*train, *more])
    assert (past.train | sides[0], past.held | sides[1]) == (past.train, past.held)
    again = {Fate.TRAIN: set(sides[0]), Fate.HELD_OUT: set(sides[1])}
    found = fingerprints([example(text) for text in train])
    assert all(texts(found, fates[: len(train)], fate) == side for fate, side in again.items())


def test_a_leak_of_an_earlier_run_is_removed_verbatim_and_edited() -> None:
    past = History()
    past.run([sentence(i) for i in range(40)])
    held = sorted(past.held.values())
    assert len(held) == 4
    leaks = [held[0], held[1].upper(), f"  {held[2]}\n", f"{held[3][:20]}z{held[3][21:]}"]
    new = [sentence(i) for i in range(100, 110)]
    fates, _ = past.run([*leaks, *new])
    assert fates[:4] == [Fate.LEAKED] * 4
    assert Fate.LEAKED not in fates[4:] and Fate.HELD_OUT in fates[4:]


def test_what_was_trained_on_is_never_held_out() -> None:
    past = History(train={each.digest: sentence(0) for each in fingerprints([example(sentence(0))])})
    fates, valid = past.run([edited(0, 5), edited(0, 30)], [sentence(0), edited(0, 60), sentence(1)])
    assert valid == [Fate.TRAINED, Fate.TRAINED, Fate.HELD_OUT]
    assert fates == [Fate.TRAIN, Fate.TRAIN]
    assert History(train=past.train).run([edited(0, 7), edited(0, 40)])[0] == [Fate.TRAIN, Fate.TRAIN]


def test_a_validation_example_is_not_trained_on_in_the_same_run() -> None:
    fates, valid = History().run([sentence(0), edited(0, 30), sentence(1)], [sentence(0)])
    assert (fates, valid) == ([Fate.LEAKED, Fate.LEAKED, Fate.TRAIN], [Fate.HELD_OUT])


def test_near_duplicates_in_a_chain_are_on_one_side() -> None:
    """Each resembles the next, and the first does not resemble the last."""
    letters = list(sentence(3))
    chain = ["".join(letters)]
    for at in range(4, 76, 8):
        letters[at] = "z"
        chain.append("".join(letters))
    assert similarity(chain[0], chain[-1]) < THRESHOLD < similarity(chain[0], chain[1])
    fates, _ = History().run([*chain, *(sentence(i) for i in range(20, 60))])
    assert len(set(fates[: len(chain)])) == 1


def test_examples_that_fill_one_template_are_not_near_duplicates() -> None:
    template = (
        "Classify the message of the customer below as one of the labels that our support desk uses: balance, "
        "transfer, freeze account, lost card, exchange rate, interest, routing number, spending history, minimum "
        "payment. Answer with the label alone, in lower case and without a full stop. Message: "
    )
    train = [f"{template}{sentence(i)[:20]}" for i in range(60)]
    fates, _ = History().run(train)
    assert fates.count(Fate.HELD_OUT) == 6
    assert similarity(train[0], train[1]) > THRESHOLD


def test_similar_text_without_spaces_is_found() -> None:
    past = History()
    past.run(["注文した商品がまだ届いていないので、配送状況を調べてもらえますか。", *(sentence(i) for i in range(9))])
    text = "注文した商品がまだ届いていないので、配送状況を調べてもらえますか…"
    near = [*past.train.values(), *past.held.values()]
    assert max(similarity(text, each) for each in near) >= THRESHOLD
    fates, _ = past.run([text])
    assert fates == [Fate.LEAKED if any("注文" in each for each in past.held.values()) else Fate.TRAIN]


@pytest.mark.parametrize(
    ("components", "target", "chosen"),
    [
        ([[0], [1], [2, 3]], 1, {0}),
        ([[0, 1, 2], [3]], 1, {3}),  # the first is too large
        ([[0, 1], [2, 3, 4]], 1, {0, 1}),  # none is small enough
        ([[0, 1, 2]], 1, set()),  # nothing would be left
        ([[0], [1], [2]], 2, {0, 1}),
        ([], 1, set()),
    ],
)
def test_whole_components_are_held_out(components: list[list[int]], target: int, chosen: set[int]) -> None:
    keys = {index: f"{index:04}" for each in components for index in each}
    assert choose_held_out(components, keys, target) == chosen
