"""On-policy replay: which prompts are requested, and which answers become examples."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from loramill.data.examples import read_row
from loramill.pipelines.nightly.questions import EvalAnswer
from loramill.pipelines.nightly.replay.policy import choose_prompts, on_policy_count, select_answers, with_answer


def chat(question: str, answer: str = "one two three four", **last: object) -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **last}]
    return json.dumps({"messages": messages}).encode()


def text(prompt: str, completion: str = "one two three four") -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion}).encode()


@given(st.integers(0, 10_000), st.floats(0, 0.9))
def test_the_count_is_the_share_of_all_examples(others: int, share: float) -> None:
    count = on_policy_count(others, share)
    assert abs(count - share * (others + count)) <= 0.5 + 1e-6


@given(
    old=st.sets(st.integers(0, 60), max_size=40),
    trained=st.sets(st.integers(0, 60), max_size=40),
    count=st.integers(0, 30),
)
def test_prompts_that_are_not_trained_on_come_first(old: set[int], trained: set[int], count: int) -> None:
    rows, plain = [chat(str(each)) for each in sorted(old)], {chat(str(each)) for each in trained}
    chosen = choose_prompts(rows, plain, count, seed="v1")
    assert len(set(chosen)) == len(chosen) == min(2 * count, len(rows)) and set(chosen) <= set(rows)
    fresh = [row for row in chosen if row not in plain]
    assert chosen[: len(fresh)] == fresh and len(fresh) == min(2 * count, len(set(rows) - plain))
    assert choose_prompts(rows[::-1], plain, count, seed="v1") == chosen


def test_another_version_is_requested_other_prompts() -> None:
    rows = [chat(str(each)) for each in range(100)]
    assert choose_prompts(rows, (), 5, seed="v1") != choose_prompts(rows, (), 5, seed="v2")


def test_tool_calls_and_answers_without_weight_are_not_requested() -> None:
    call = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    rows = [chat("a"), chat("b", "", tool_calls=call), chat("c", weight=0), text("d"), chat("e", weight=2)]
    assert set(choose_prompts(rows, (), 5, seed="")) == {rows[0], rows[3], rows[4]}


def test_answers_that_score_are_kept_in_order() -> None:
    prompts = [text(str(each)) for each in range(6)]
    answers = [
        EvalAnswer("one two three"),  # token F1 of 6/7
        EvalAnswer("one"),  # 2/5
        None,
        EvalAnswer("one two three four", truncated=True),
        EvalAnswer("one two three four"),
        EvalAnswer("four three two one"),
    ]
    kept = select_answers(prompts, answers, 2, 0.7)
    assert kept == [text("0", "one two three"), prompts[4]]
    assert len(select_answers(prompts, answers, 9, 0.7)) == 3
    assert len(select_answers(prompts, answers, 9, 0.0)) == 4
    assert select_answers([text("a", "x")], [EvalAnswer("  ")], 9, 0.0) == []


@given(st.text(min_size=1).filter(lambda each: each.strip()), st.booleans())
def test_only_the_last_answer_changes(answer: str, is_chat: bool) -> None:
    old = chat("question", weight=2) if is_chat else text("question")
    before, after = read_row(old, 1), read_row(with_answer(old, answer), 1)
    assert after.completion == answer and after.weights == before.weights
    assert after.messages[:-1] == before.messages[:-1] and after.prompt == before.prompt
