"""The benchmark of poisoned data: how the rows of its three runs are made."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loramill.errors import InvalidRequest
from loramill_bench.nightly import poisoned


def row(question: str, answer: str) -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}).encode()


def parsed(rows: tuple[bytes, ...] | list[bytes]) -> list[tuple[str, str]]:
    found = [json.loads(each)["messages"] for each in rows]
    return [(question["content"], answer["content"]) for question, answer in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(poisoned, "EXAMPLES", 10)
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(row(f"q{n}", f"label{n % 9}") for n in range(180)))
    return tmp_path


def test_batches_have_their_own_labels_and_more_has_those_of_the_first(folder: Path) -> None:
    batches = poisoned.read_batches(folder, labels=True)
    labels = [{answer for _, answer in parsed(rows)} for rows in (*batches.rows, batches.more)]
    assert labels[:3] == [{f"label{first}", f"label{first + 3}", f"label{first + 6}"} for first in range(3)]
    assert labels[3] == labels[0]
    assert not {*batches.rows[0]} & {*batches.more}
    assert [len(rows) for rows in (*batches.rows, batches.more)] == [10] * 4


def test_a_tenant_without_labels_is_not_divided(folder: Path) -> None:
    batches = poisoned.read_batches(folder, labels=False)
    assert [answer for _, answer in parsed(batches.rows[0])] == [f"label{n % 9}" for n in range(10)]
    with pytest.raises(InvalidRequest, match=r"train\.jsonl is missing"):
        poisoned.read_batches(folder / "missing", labels=False)


def test_shuffled_rows_have_the_same_questions_and_answers_in_another_order() -> None:
    rows = [row(f"q{n}", f"label{n}") for n in range(20)]
    found = parsed(poisoned.shuffled(rows, random.Random(1)))
    assert [question for question, _ in found] == [f"q{n}" for n in range(20)]
    assert sorted(answer for _, answer in found) == sorted(f"label{n}" for n in range(20))
    assert sum(question[1:] == answer[5:] for question, answer in found) < 5


def test_a_respelled_row_differs_in_case_and_spaces_of_the_question_alone() -> None:
    assert parsed([poisoned.respelled(row("what is it", "a Label"))]) == [("WHAT  IS  IT", "a Label")]
