"""Which old prompts the champion answers, and which of its answers are replayed. Pure functions of rows of JSONL.

Training on what a version answers itself moves its weights little, and so keeps what it knows: with 10% of such
examples, sequential fine-tuning lost 0.65 points of its earlier tasks instead of 13.93 (TRACE, arXiv 2605.29495).
An example is an old row in which the champion's answer replaces the old one:

    prompts = choose_prompts(old_rows, new_rows, on_policy_count(len(new_rows), share), seed=version)
    answers = ...                        # the champion's to `read_row(prompt, 1)` of each, in their order
    new_rows += select_answers(prompts, answers, on_policy_count(len(new_rows), share), min_score)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from itertools import islice

from loramill.data import jsonl
from loramill.data.examples import read_row
from loramill.data.new_data import shuffled
from loramill.pipelines.nightly.questions import EvalAnswer
from loramill.pipelines.nightly.text_metrics import token_f1

#: Prompts that are answered for each example that is wanted, since some answers do not score.
PROMPTS_PER_EXAMPLE = 2


def on_policy_count(others: int, share: float) -> int:
    """The number of examples that are a share (0 to below 1) of all, together with this number of others."""
    return round(others * share / (1 - share))


def choose_prompts(
    old: Sequence[bytes],
    trained: Collection[bytes],
    count: int,
    *,
    seed: str,
    usable: Callable[[bytes], bool] = lambda row: True,
) -> list[bytes]:
    """The old rows whose prompts the champion answers, first those that are not trained on as they are.

    Args:
        old: rows that the champion was trained on; tool calls are not replayed.
        trained: rows that are trained on with their old answers.
        count: number of examples that are wanted.
        seed: another seed gives another choice.
        usable: whether a row may be chosen.
    """
    ordered = sorted(shuffled(old, seed), key=lambda row: row in trained)
    found = (row for row in ordered if _ends_with_text(row) and usable(row))
    return list(islice(found, PROMPTS_PER_EXAMPLE * count))


def select_answers(
    prompts: Sequence[bytes], answers: Sequence[EvalAnswer | None], count: int, min_score: float
) -> list[bytes]:
    """The first `count` rows with the champion's answers that score.

    Args:
        prompts: old rows.
        answers: the champion's, in the order of the rows; None: there is none.
        min_score: the least token F1 against the old answer, 0 to 1.
    """
    found = [
        with_answer(row, answer.text)
        for row, answer in zip(prompts, answers, strict=True)
        if answer is not None and answer.text.strip() and not answer.truncated
        if token_f1(answer.text, read_row(row, 1).completion) >= min_score
    ]
    return found[:count]


def with_answer(row: bytes, answer: str) -> bytes:
    """A row in which another text is the last answer."""
    line = jsonl.parse(row)
    if "messages" in line:
        line["messages"][-1] |= {"content": answer}
    else:
        line["completion"] = answer
    return json.dumps(line, ensure_ascii=False).encode()


def _ends_with_text(row: bytes) -> bool:
    line = jsonl.parse(row)
    last = line["messages"][-1] if "messages" in line else line
    return not (last.get("tool_calls") or last.get("function_call")) and last.get("weight") != 0
