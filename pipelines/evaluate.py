"""Asks many questions of many models through the gateway, all mixed, so that the engine batches them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI

from loramill.chat import Message
from loramill.dataset import Example

#: Requests in flight; more than an engine decodes at once would only wait there.
CONCURRENCY = 48


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for one model, and the answer it should give."""

    model: str
    messages: tuple[Message, ...]
    prompt: str | None
    reference: str


def questions_of(model: str, examples: Sequence[Example]) -> list[Question]:
    """The held-out examples as questions for `model`."""
    return [Question(model, example.messages[:-1], example.prompt, example.completion) for example in examples]


def ask_all(
    client: AsyncOpenAI, questions: Sequence[Question], *, report: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Returns the greedy answers in the order of the questions; `report` hears how many are done.

    Questions of all models go round in turn, so that a batch holds as many adapters as there are.

    Raises:
        openai.OpenAIError: the gateway refused a question, or stayed away longer than the client's retries.
    """
    return asyncio.run(_ask_all(client, questions, report))


async def _ask_all(client: AsyncOpenAI, questions: Sequence[Question], report: Callable[[int], None]) -> list[str]:
    answers = [""] * len(questions)
    turn: dict[str, int] = {}
    places: list[tuple[int, int]] = []
    for index, question in enumerate(questions):
        turn[question.model] = turn.get(question.model, -1) + 1
        places.append((turn[question.model], index))
    waiting = iter(sorted(places))
    done = 0

    async def stream() -> None:
        nonlocal done
        for _, index in waiting:
            answers[index] = await _ask(client, questions[index])
            done += 1
            report(done)

    async with client:
        await asyncio.gather(*(stream() for _ in range(min(CONCURRENCY, len(questions)))))
    return answers


async def _ask(client: AsyncOpenAI, question: Question) -> str:
    # Room for twice the reference, so that a model that rambles costs little and still can't be right.
    limit = len(question.reference) * 2 // 3 + 8
    if question.prompt is not None:
        completion = await client.completions.create(
            model=question.model, prompt=question.prompt, max_tokens=limit, temperature=0
        )
        return completion.choices[0].text
    answer = await client.chat.completions.create(
        model=question.model,
        messages=list(question.messages),  # type: ignore[arg-type]  # our Message is OpenAI's, written as one type
        max_tokens=limit,
        temperature=0,
    )
    return answer.choices[0].message.content or ""
