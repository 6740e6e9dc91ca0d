"""The forgetting benchmark: slices of labels, and runs with a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramill.errors import InvalidRequest
from loramill_bench.nightly import forgetting

from ...jobs.conftest import base_of, tiny_chat_base

__all__ = ["tiny_chat_base"]


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    """A folder with a tenant whose questions have one of ten labels."""
    folder = tmp_path / "tenants"
    (folder / "acme").mkdir(parents=True)
    for name, count in (("train", 120), ("test", 20)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {number * number} number {number}"},
                    {"role": "assistant", "content": f"label{number % 10}"},
                ]
            }
            for number in range(count)
        ]
        (folder / "acme" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_slices_divide_the_labels(tenants: Path) -> None:
    slices = forgetting.read_slices(tenants / "acme", 5, 8)
    assert [{each.completion for each in part.test} for part in slices] == [
        {f"label{first}", f"label{first + 5}"} for first in range(5)
    ]
    for part in slices:
        labels = {json.loads(row)["messages"][-1]["content"] for row in part.train}
        assert labels == {each.completion for each in part.test} and len(part.train) == 8
    assert sum(len(part.train) for part in forgetting.read_slices(tenants / "acme", 5)) == 120


def test_a_tenant_with_too_few_labels_or_files_is_refused(tenants: Path) -> None:
    with pytest.raises(InvalidRequest, match="acme has 10 labels; 11 are needed"):
        forgetting.read_slices(tenants / "acme", 11)
    with pytest.raises(InvalidRequest, match=r"train\.jsonl is missing"):
        forgetting.read_slices(tenants / "bolt", 5)


def test_each_kind_of_replay_has_adapters_of_its_own() -> None:
    found = {
        kind: forgetting.definition().for_adapter(f"bench/{kind}-acme").replay
        for kind in (*forgetting.REPLAY, forgetting.ALONE)
    }
    assert {kind: each.plain_examples for kind, each in found.items()} == {
        "none": 0,
        "plain": 64,
        "on-policy": 64,
        "alone": 64,
    }
    assert [kind for kind, each in found.items() if each.on_policy] == ["on-policy", "alone"]


def test_all_runs_are_measured(
    tenants: Path, tiny_chat_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tiny_chat_base, tmp_path)
    monkeypatch.setenv("LORAMILL_BASE", str(tiny_chat_base))
    monkeypatch.setattr(forgetting, "RUNS", 2)  # five of all examples take two minutes
    reported: list[str] = []
    found = forgetting.results(base, tenants, reported.append, names=("acme",), examples=12)
    assert reported == ["forgetting, run 1 of 2", "forgetting, run 2 of 2"]
    targets = {each.case: each.target for each in found if each.target is not None}
    assert targets == {
        "forgetting, 1 tenants: on-policy replay, loss of the first slice": 0.03,
        "forgetting, 1 tenants: on-policy replay, newest slice below a model of it alone": 0.03,
    }
    assert len(found) == 3 * 3 + 2 and all(0 <= abs(each.value) <= 1 for each in found)
