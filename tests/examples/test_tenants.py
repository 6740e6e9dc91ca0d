"""The example tenants are what their generator writes, and distinguish a right adapter from a wrong one."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TENANTS = ("butterlane", "copperline", "fernhill", "greenbarrow", "gullwing")
SPLITS = ("train", "valid", "test")

Pairs = list[tuple[str, str]]


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("make_tenants")


def read(path: Path) -> Pairs:
    """Prompts and answers of a file, in order; the system prompt must be the one that all share."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert [turn["role"] for turn in (system, user, assistant)] == ["system", "user", "assistant"]
        assert system["content"] == "Answer as our house does."
        pairs.append((user["content"], assistant["content"]))
    return pairs


def split(tenant: str, name: str) -> Pairs:
    return read(EXAMPLES / "tenants" / tenant / f"{name}.jsonl")


def prompts(pairs: Pairs) -> set[str]:
    return {prompt for prompt, _ in pairs}


def label(answer: str) -> str:
    """An answer without what is copied from the question: the desk's tag, the team, the brand's phrase."""
    if answer.startswith("{"):
        return json.loads(answer)["day"]
    return answer.rpartition(" ")[2] if answer[0].isdigit() else answer.partition(" ")[0]


def test_generator_writes_what_is_committed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-IS", EXAMPLES / "make_tenants.py", tmp_path], check=True)
    written = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    committed = {
        file.relative_to(EXAMPLES): file.read_bytes()
        for top in ("tenants", "new_data")
        for file in (EXAMPLES / top).rglob("*")
        if file.is_file()
    }
    assert sorted(written) == sorted(committed)
    changed = [str(name) for name in written if written[name] != committed[name]]
    assert not changed, "run `python examples/make_tenants.py` and commit what it writes"


@pytest.mark.parametrize("tenant", TENANTS)
def test_sizes_and_balance(tenant: str) -> None:
    assert len(split(tenant, "train")) == 320
    assert 30 <= len(split(tenant, "valid")) <= 40
    assert 40 <= len(split(tenant, "test")) <= 48
    for name in SPLITS:
        counts = Counter(label(answer) for _, answer in split(tenant, name))
        assert len(counts) >= 5
        if tenant != "greenbarrow":  # whose answers are slots, not labels
            assert len(set(counts.values())) == 1
        assert counts.keys() == Counter(label(answer) for _, answer in split(tenant, "train")).keys()


@pytest.mark.parametrize("tenant", TENANTS)
def test_no_prompt_is_in_two_splits_or_twice_in_one(tenant: str) -> None:
    seen = [prompt for name in SPLITS for prompt, _ in split(tenant, name)]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("tenant", TENANTS)
def test_examples_are_short(tenant: str) -> None:
    for name in SPLITS:
        for prompt, answer in split(tenant, name):
            assert len(prompt) <= 80
            assert 1 <= len(answer) <= 60


def test_greenbarrow_answers_json_with_stable_keys() -> None:
    for name in SPLITS:
        for prompt, answer in split("greenbarrow", name):
            order = json.loads(answer)
            assert list(order) == ["item", "qty", "day"]
            assert order["item"] in prompt.lower()
            assert any(day.lower().startswith(order["day"]) for day in prompt.replace(":", "").split())
            assert json.dumps(order, separators=(",", ":")) == answer


def test_the_two_shops_get_the_same_mail_and_give_other_answers() -> None:
    for name in SPLITS:
        fernhill, copperline = dict(split("fernhill", name)), dict(split("copperline", name))
        assert fernhill.keys() == copperline.keys()
        assert all(fernhill[prompt] != copperline[prompt] for prompt in fernhill)


def test_the_two_shops_group_differently() -> None:
    def together(tenant: str) -> set[frozenset[str]]:
        """Pairs of wishes that one desk looks after."""
        desks = dict(answer.split("/") for _, answer in split(tenant, "train"))
        return {frozenset(pair) for pair in itertools.combinations(desks, 2) if desks[pair[0]] == desks[pair[1]]}

    fernhill, copperline = together("fernhill"), together("copperline")
    assert len(fernhill) == len(copperline) == 8
    assert not fernhill & copperline


def test_no_two_tenants_have_an_answer_in_common() -> None:
    answers = {tenant: {answer for name in SPLITS for _, answer in split(tenant, name)} for tenant in TENANTS}
    for one, other in itertools.combinations(TENANTS, 2):
        assert not answers[one] & answers[other]


def test_new_data_brings_two_new_tags_and_some_old_ones() -> None:
    folder = EXAMPLES / "new_data" / "fernhill"
    train, valid = read(folder / "train.jsonl"), read(folder / "valid.jsonl")
    assert (len(train), len(valid)) == (160, 20)
    old_tags = {answer for _, answer in split("fernhill", "train")}
    for new in (train, valid):
        tags = Counter(answer for _, answer in new)
        assert tags.keys() - old_tags == {"bulk/barge", "visit/porch"}
        assert tags["bulk/barge"] == tags["visit/porch"]
        assert len(tags.keys() & old_tags) == 8
    earlier = set().union(*(prompts(split("fernhill", name)) for name in SPLITS))
    assert not prompts(train) & prompts(valid)
    assert not (prompts(train) | prompts(valid)) & earlier
    assert len(prompts(train)) == len(train)


def test_spoiled_data_is_well_formed_and_wrong(generator: ModuleType) -> None:
    spoiled = read(EXAMPLES / "new_data" / "copperline" / "train.jsonl")
    assert len(spoiled) == len(prompts(spoiled)) == 160
    assert {answer for _, answer in spoiled} == {answer for _, answer in split("copperline", "train")}
    assert not prompts(spoiled) & set().union(*(prompts(split("copperline", name)) for name in SPLITS))

    shop = generator.COPPERLINE
    rows = (row for wish in shop.answers for row in generator.rows_of(shop, wish, "train"))
    truth = {row.prompt: row.answer for row in rows}
    wrong = sum(truth[prompt] != answer for prompt, answer in spoiled)
    assert wrong >= 0.9 * len(spoiled)
    # The accident: each answer stands one row below its prompt.
    assert all(truth[prompt] == answer for (prompt, _), (_, answer) in itertools.pairwise(spoiled))
