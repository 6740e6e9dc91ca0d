"""Sends evaluation questions to many models through the gateway, all mixed, so that the engine batches them.

A question asks for an answer, or for the loss on the reference: the gateway then echoes its tokens with their log
probabilities.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import openai
from openai import AsyncOpenAI
from openai.types import CompletionUsage

from loramill.client.http import error_from_response
from loramill.data.conversation import answer_text, to_request_messages
from loramill.data.encoding import EncodedExample, encode_example
from loramill.data.examples import Example
from loramill.data.messages import Message
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import EngineFault, LoramillError

#: Requests in flight; more than an engine runs at once would only wait there.
CONCURRENCY = 48


@dataclass(frozen=True, slots=True)
class EvalQuestion:
    """One prompt for one model, and the maximum number of tokens of the answer.

    Attributes:
        reference: prompt and reference as tokens, to ask for the loss on the reference instead of an answer.
    """

    model: str
    messages: tuple[Message, ...]
    prompt: str | None
    max_tokens: int
    tools: tuple[Mapping[str, Any], ...] = ()
    reference: EncodedExample | None = None


@dataclass(frozen=True, slots=True)
class EvalAnswer:
    """A model's answer.

    Attributes:
        truncated: whether it reached its maximum number of tokens.
        loss: mean loss per token of the reference, in nats, where that was the question.
        tokens: number of tokens of the prompt and the answer.
    """

    text: str
    truncated: bool = False
    loss: float | None = None
    tokens: int = 0


#: What is done with an answer and the index of its question as soon as it is there.
Keep = Callable[[int, EvalAnswer], None]


def build_questions(model: str, examples: Sequence[Example], tokenizer: ChatTokenizer) -> list[EvalQuestion]:
    """The held-out examples as questions for `model`; `tokenizer` is the base's."""
    return [
        EvalQuestion(
            model,
            example.messages[:-1],
            example.prompt,
            max_answer_tokens(example.completion, tokenizer),
            example.tools,
        )
        for example in examples
    ]


def build_loss_questions(model: str, examples: Sequence[Example], tokenizer: ChatTokenizer) -> list[EvalQuestion]:
    """Questions for the loss of `model` on the last answers of the examples, in the tokens that training uses.

    Raises:
        DatasetInvalid: as `encode_example`.
    """
    return [
        EvalQuestion(
            model,
            example.messages[:-1],
            example.prompt,
            max_tokens=0,
            reference=encode_example(tokenizer, replace(example, weights=None), "only_last"),
        )
        for example in examples
    ]


def max_answer_tokens(reference: str, tokenizer: ChatTokenizer) -> int:
    """The maximum number of tokens of an answer: twice the reference's and 8.

    A model that rambles then costs little, and a right answer always fits. Tokens are the base's own: a character has
    a quarter of a token in English and up to three in Japanese, Korean or Thai.
    """
    return 2 * len(tokenizer.encode_text(reference)) + 8


def answer_all(
    client: AsyncOpenAI,
    questions: Sequence[EvalQuestion],
    *,
    report: Callable[[int], None] = lambda done: None,
    keep: Keep = lambda index, answer: None,
) -> list[EvalAnswer | LoramillError]:
    """Returns the greedy answers, or errors in their place, in the order of the questions.

    The models take turns, so that a batch contains as many adapters as possible.

    Args:
        report: called with the number of finished questions.
        keep: called with each answer and its question's index as soon as it is there.

    Raises:
        openai.APIConnectionError: the gateway was unreachable for longer than the client's retries.
    """
    return asyncio.run(_answer_all(client, questions, report, keep))


async def _answer_all(
    client: AsyncOpenAI, questions: Sequence[EvalQuestion], report: Callable[[int], None], keep: Keep
) -> list[EvalAnswer | LoramillError]:
    answers: list[EvalAnswer | LoramillError] = [EvalAnswer("")] * len(questions)
    turn: dict[str, int] = {}
    order: list[tuple[int, int]] = []
    for index, question in enumerate(questions):
        turn[question.model] = turn.get(question.model, -1) + 1
        order.append((turn[question.model], index))
    waiting = iter(sorted(order))
    done = 0

    async def stream() -> None:
        nonlocal done
        for _, index in waiting:
            try:
                answers[index] = answer = await _answer(client, questions[index])
                keep(index, answer)
            except openai.APIStatusError as error:
                answers[index] = error_from_response(error.status_code, error.body, str(client.base_url))
            except EngineFault as error:
                answers[index] = error
            done += 1
            report(done)

    async with client:
        await asyncio.gather(*(stream() for _ in range(min(CONCURRENCY, len(questions)))))
    return answers


async def _answer(client: AsyncOpenAI, question: EvalQuestion) -> EvalAnswer:
    if question.reference is not None:
        return await _loss(client, question.model, question.reference)
    if question.prompt is not None:
        completion = await client.completions.create(
            model=question.model, prompt=question.prompt, max_tokens=question.max_tokens, temperature=0
        )
        choice = completion.choices[0]
        return EvalAnswer(choice.text, choice.finish_reason == "length", tokens=_tokens(completion.usage))
    answer = await client.chat.completions.create(
        model=question.model,
        messages=to_request_messages(question.messages),  # type: ignore[arg-type]  # our Message is OpenAI's, written as one type
        tools=list(question.tools) or openai.omit,  # type: ignore[arg-type]  # likewise
        max_tokens=question.max_tokens,
        temperature=0,
    )
    message, truncated = answer.choices[0].message, answer.choices[0].finish_reason == "length"
    calls = [call.function for call in message.tool_calls or [] if call.type == "function"]
    text = answer_text(message.content or "", [(call.name, _arguments(call.arguments)) for call in calls])
    return EvalAnswer(text, truncated, tokens=_tokens(answer.usage))


async def _loss(client: AsyncOpenAI, model: str, reference: EncodedExample) -> EvalAnswer:
    completion = await client.completions.create(
        model=model, prompt=list(reference.tokens), max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    found = completion.choices[0].logprobs
    known = found.token_logprobs if found is not None and found.token_logprobs else []
    supervised = [each for each in known[reference.prompt_length :] if each is not None]
    if len(known) != len(reference.tokens) or not supervised:
        raise EngineFault(f"'{model}' echoed {len(known)} of {len(reference.tokens)} tokens; the loss is unknown.")
    return EvalAnswer("", loss=-sum(supervised) / len(supervised), tokens=_tokens(completion.usage))


def _tokens(usage: CompletionUsage | None) -> int:
    return 0 if usage is None else usage.total_tokens


def _arguments(text: str) -> Any:
    """A call's arguments; the text itself if it is not JSON, which is wrong but must not end the run."""
    try:
        return json.loads(text)
    except ValueError:
        return text
