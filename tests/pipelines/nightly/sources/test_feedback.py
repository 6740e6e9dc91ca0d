"""Feedback becomes examples and preference pairs, each piece once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.data.examples import read_examples
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import FeedbackDefinition
from loramill.pipelines.nightly.sources.feedback import collect_adapter, collect_feedback
from loramill.pipelines.nightly.sources.feedback_rows import examples_of, pairs_of
from loramill.registry import Registry, datasets, nightly, tenants
from loramill.registry.adapters import get_or_create
from loramill.registry.feedback import completions, ratings
from loramill.registry.feedback.use import UnusedFeedback
from loramill.types import CompletionKind, CompletionRecord, CompletionStorage, Rating

from ....databases import create_sqlite_database

NAME = AdapterName("acme", "support")


def chat(id_: str, question: str = "Lost?", answer: str = "An answer.", **request: Any) -> CompletionRecord:
    message = {"role": "assistant", "content": answer, "refusal": None}
    return CompletionRecord(
        id=id_,
        kind=CompletionKind.CHAT,
        tenant="acme",
        adapter=str(NAME),
        version="a" * 64,
        model=str(NAME),
        request={"messages": [{"role": "user", "content": question}], "tools": []} | request,
        response={"choices": [{"index": 0, "message": message}]},
        created_at=1.0,
    )


def text(id_: str, prompt: Any, answer: str, *, echo: bool = False) -> CompletionRecord:
    request = {"prompts": [prompt], "n": 1, "echo": echo}
    choices = [{"index": 0, "text": answer}]
    changes = {"kind": CompletionKind.TEXT, "request": request, "response": {"choices": choices}}
    return chat(id_).model_copy(update=changes)


def unused(completion: CompletionRecord, rating: Rating | None = None, correction: str | None = None) -> UnusedFeedback:
    return UnusedFeedback(
        id=f"fb-{completion.id}",
        completion=completion,
        choice=0,
        rating=rating,
        correction=correction,
        for_example=correction is not None,
        for_pair=True,
    )


def lines(rows: list[Any]) -> list[Any]:
    return [json.loads(each.row) for each in rows]


def test_a_correction_is_the_conversation_with_the_corrected_answer() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [_call()]}
    messages = [{"role": "user", "content": "Lost?"}, called, {"role": "tool", "tool_call_id": "c", "content": "3"}]
    rows, unusable = examples_of([unused(chat("1", messages=messages, tools=[tool]), correction="Right.")])
    assert not unusable
    assert lines(rows) == [{"messages": [*messages, {"role": "assistant", "content": "Right."}], "tools": [tool]}]
    rows, _ = examples_of([unused(text("2", "Q:", "Q: wrong", echo=True), correction=" right")])
    assert lines(rows) == [{"prompt": "Q:", "completion": " right"}]


def _call() -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_rows_have_the_fields_that_they_are_divided_by() -> None:
    requested = chat("1").model_copy(update={"user": "ann", "metadata": {"page": "cards", "trace": "17"}})
    rows, _ = examples_of([unused(requested, correction="Right.")], ("user", "page", "team"))
    assert lines(rows)[0]["metadata"] == {"user": "ann", "page": "cards"}
    pairs, _ = pairs_of([unused(requested, correction="Right.")], ("user",))
    assert lines(pairs)[0]["metadata"] == {"user": "ann"}
    named = requested.model_copy(update={"metadata": {"user": "ann-17"}})
    assert lines(examples_of([unused(named, correction="Right.")], ("user",))[0])[0]["metadata"] == {"user": "ann-17"}
    assert "metadata" not in lines(examples_of([unused(requested, correction="Right.")])[0])[0]


def test_what_is_no_valid_example_has_its_reason() -> None:
    rows, unusable = examples_of(
        [unused(text("1", [5, 6], "x"), correction="y"), unused(chat("2", question=" "), correction="y")]
    )
    assert not rows and [each.feedback for each in unusable] == [("fb-1",), ("fb-2",)]
    assert "token ids" in unusable[0].reason and "messages[0].content is empty" in unusable[1].reason


def test_a_correction_is_better_than_its_answer_and_good_than_bad() -> None:
    rows, unusable = pairs_of(
        [
            unused(chat("1", answer="wrong"), correction="right"),
            unused(chat("2", answer="fine"), Rating.GOOD),
            unused(chat("3", answer="rude"), Rating.BAD),
            unused(chat("4", question="Else?", answer="rude"), Rating.BAD),
        ]
    )
    assert not unusable and [each.feedback for each in rows] == [("fb-1",), ("fb-2", "fb-3")]
    answers = [
        (row["preferred_output"][0]["content"], row["non_preferred_output"][0]["content"]) for row in lines(rows)
    ]
    assert answers == [("right", "wrong"), ("fine", "rude")]
    rows, _ = pairs_of([unused(text("1", "Q:", "Q: a", echo=True), correction=" b")])
    assert lines(rows) == [{"prompt": "Q:", "chosen": " b", "rejected": " a"}]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([*Rating]), st.booleans()), max_size=12))
def test_each_feedback_is_in_at_most_one_pair_of_one_prompt(given: list[tuple[str, Rating, bool]]) -> None:
    feedback = [
        unused(chat(str(number), prompt, f"answer {number}"), rating, "corrected" if corrected else None)
        for number, (prompt, rating, corrected) in enumerate(given)
    ]
    rows, unusable = pairs_of(feedback)
    used = [id_ for row in rows for id_ in row.feedback]
    assert len(used) == len(set(used)) and not unusable
    for prompt in "ab":
        rated = [rating for each, rating, corrected in given if each == prompt and not corrected]
        expected = min(rated.count(Rating.GOOD), rated.count(Rating.BAD))
        made = [row for row in rows if len(row.feedback) == 2 and f'"content": "{prompt}"'.encode() in row.row]
        assert len(made) == expected
    if rows:
        assert read_examples(b"\n".join(row.row for row in rows), "pairs").kind == "preference"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    url = f"sqlite:///{tmp_path / 'loramill.db'}"
    create_sqlite_database(url)
    opened = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with opened.writing() as session:
        tenants.create(session, "acme")
        tenants.set_storage(session, "acme", CompletionStorage(store_completions=True))
        get_or_create(session, NAME)
    yield opened
    opened.close()


def give(registry: Registry, completion: CompletionRecord, **feedback: Any) -> None:
    with registry.writing() as session:
        completions.add_many(session, [completion])
        ratings.give(session, completion.id, "acme", **feedback)


def content(registry: Registry, file: str | None) -> list[Any]:
    with registry.reading() as session:
        artifact = datasets.get(session, file or "").artifact
    return [json.loads(row) for row in registry.artifacts.read(artifact, "data.jsonl").splitlines()]


def test_feedback_is_collected_once_into_new_data_and_pairs(registry: Registry) -> None:
    give(registry, chat("1", answer="wrong"), correction="right")
    give(registry, chat("2", answer="rude"), rating=Rating.BAD)
    [collected] = collect_feedback(registry)
    assert (collected.adapter, collected.examples, collected.pairs) == (str(NAME), 1, 1)
    assert content(registry, collected.examples_file)[0]["messages"][-1]["content"] == "right"
    assert content(registry, collected.pairs_file)[0]["preferred_output"][0]["content"] == "right"
    with registry.reading() as session:
        [waiting] = nightly.pending_data(session)
    assert waiting.train == (collected.examples_file, collected.pairs_file)
    # The bad answer still waits for a good one to the same prompt.
    [again] = collect_feedback(registry)
    assert (again.examples, again.pairs) == (0, 0)
    give(registry, chat("3", answer="fine"), rating=Rating.GOOD)
    [later] = collect_feedback(registry)
    assert (later.examples, later.pairs) == (0, 1)
    assert collect_feedback(registry) == []


def test_pairs_wait_until_there_are_enough(registry: Registry) -> None:
    rules = FeedbackDefinition(min_pairs=3)
    for number in range(2):
        give(registry, chat(str(number), answer="wrong"), correction="right")
    [collected] = collect_feedback(registry, rules)
    assert (collected.examples, collected.pairs, collected.open_pairs) == (2, 0, 2)
    give(registry, chat("2", answer="wrong"), correction="right")
    [collected] = collect_feedback(registry, rules)
    assert (collected.examples, collected.pairs, collected.open_pairs) == (1, 3, 0)
    assert len(content(registry, collected.pairs_file)) == 3 and collect_feedback(registry, rules) == []


def test_a_deleted_completion_leaves_the_pairs_that_no_run_has_collected(registry: Registry) -> None:
    for number in range(3):
        give(registry, chat(str(number), answer=f"wrong {number}"), correction=f"right {number}")
    collect_feedback(registry, FeedbackDefinition(corrections=False, min_pairs=2))
    with registry.writing() as session:
        removed = completions.delete(session, "1", "acme", CompletionKind.CHAT)
        assert removed.files == () and nightly.pending_data(session) == []
    [collected] = collect_feedback(registry, FeedbackDefinition(corrections=False, min_pairs=2))
    assert [each["preferred_output"][0]["content"] for each in content(registry, collected.pairs_file)] == [
        "right 0",
        "right 2",
    ]


def test_parts_that_are_not_wanted_wait(registry: Registry) -> None:
    give(registry, chat("1", answer="wrong"), correction="right")
    [collected] = collect_feedback(registry, FeedbackDefinition(corrections=False, min_pairs=1))
    assert (collected.examples, collected.pairs) == (0, 1)
    [collected] = collect_feedback(registry, FeedbackDefinition(ratings=False))
    assert (collected.examples, collected.pairs) == (1, 0)


def test_deleted_completions_are_never_collected(registry: Registry) -> None:
    give(registry, chat("1"), correction="right")
    give(registry, chat("2"), correction="right")
    with registry.writing() as session:
        completions.delete(session, "1", "acme", CompletionKind.CHAT)
    [collected] = collect_feedback(registry)
    assert collected.examples == 1
    # What is deleted before a run collects the file leaves the file, and the rest is collected again.
    with registry.writing() as session:
        completions.delete(session, "2", "acme", CompletionKind.CHAT)
        assert nightly.pending_data(session) == []
    assert collect_feedback(registry) == []


def test_unusable_feedback_is_reported_once(registry: Registry) -> None:
    give(registry, chat("1", question=" "), correction="right")
    [collected] = collect_feedback(registry)
    assert collected.examples == 0 and "messages[0].content is empty" in collected.unusable[0]
    assert collect_feedback(registry) == []


def test_feedback_of_another_form_than_the_adapters_data_waits(registry: Registry) -> None:
    give(registry, chat("1", answer="wrong"), correction="right")
    give(registry, text("2", "Q:", " wrong"), correction=" right")
    with registry.writing() as session:
        row = json.dumps({"prompt": "Q:", "completion": " a"}).encode()
        artifact = registry.artifacts.put({"data.jsonl": row})
        file = datasets.create(session, "acme", "old.jsonl", artifact, len(row), 1)
        nightly.add_data(session, NAME, file.id, None)
    [collected] = collect_feedback(registry)
    assert (collected.examples, collected.waiting) == (1, 1)
    assert content(registry, collected.examples_file) == [{"prompt": "Q:", "completion": " right"}]


def test_a_failure_marks_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    give(registry, chat("1", answer="wrong"), correction="right")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(nightly, "add_data", lambda *_: (_ for _ in ()).throw(RuntimeError))
        collect_feedback(registry)
    [collected] = collect_feedback(registry)
    assert collected.examples == 1


def test_two_runs_at_once_use_feedback_once(registry: Registry) -> None:
    for number in range(5):
        give(registry, chat(str(number), answer="wrong"), correction="right")
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda _: collect_adapter(registry, str(NAME)).examples, range(4)))
    assert sorted(made) == [0, 0, 0, 5]


def test_a_bad_row_of_a_source_does_not_stop_feedback(registry: Registry) -> None:
    give(registry, text("1", "Q:", " wrong"), correction=" right")
    raw = b'not JSON\n\xff\n{"prompt": "Q", "completion": ""}\n{"prompt": "Q", "completion": "a"}\n'
    with registry.writing() as session:
        for content_ in (b"{\n", raw):
            artifact = registry.artifacts.put({"data.jsonl": content_})
            file = datasets.create(session, "acme", "x.jsonl", artifact, len(content_), 1)
            nightly.add_data(session, NAME, file.id, None)
    [collected] = collect_feedback(registry)
    assert (collected.examples, collected.waiting) == (1, 0)
