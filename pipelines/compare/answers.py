"""Answers to test questions, by the engine and by transformers, and the time per token."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from loramill.data.examples import Example
from loramill.data.tokenizer import ChatTokenizer
from loramill.pipelines.compare.methods.transformers import MakeCache, empty_cache, greedy
from loramill.pipelines.compare.timing import Effort, interleaved
from loramill.pipelines.nightly.text_metrics import Score, score
from loramill.serve.offline import OfflineEngine
from loramill.serve.protocol import TextRequest
from loramill.serve.sampling_params import SamplingParams

#: Tokens of the answer whose speed is measured, and the number of measurements.
TIMED_TOKENS, ROUNDS = 32, 9

Report = Callable[[int], None]


class Answerer(Protocol):
    """Something that answers examples greedily."""

    def answer(self, examples: Sequence[Example], limits: Sequence[int], report: Report) -> list[str]:
        """Returns the answers in order; `limits` are their maximum numbers of tokens."""
        ...

    def generate_tokens(self, example: Example, tokens: int) -> None:
        """Answers one example with exactly `tokens` tokens."""
        ...


class EngineAnswerer:
    """Answers by the serving engine, with a version or the base alone."""

    def __init__(self, engine: OfflineEngine, version: str | None = None) -> None:
        self._engine = engine
        self._version = version

    def answer(self, examples: Sequence[Example], limits: Sequence[int], report: Report) -> list[str]:
        """See `Answerer`; raises the engine's errors."""
        requests = [self._request(each, limit) for each, limit in zip(examples, limits, strict=True)]
        texts = []
        for completion in self._engine.generate(requests, ordered=True):
            if completion.error is not None:
                raise completion.error
            texts.append(completion.text)
            report(len(texts))
        return texts

    def generate_tokens(self, example: Example, tokens: int) -> None:
        """See `Answerer`."""
        (completion,) = self._engine.generate([self._request(example, tokens, ignore_eos=True)])
        if completion.error is not None:
            raise completion.error

    def _request(self, example: Example, limit: int, *, ignore_eos: bool = False) -> TextRequest:
        return TextRequest(
            id="",
            tenant="",
            version=self._version,
            messages=example.messages[:-1],
            tools=example.tools,
            prompt=example.prompt,
            sampling_params=SamplingParams(max_tokens=limit),
            ignore_eos=ignore_eos,
        )


class TransformersAnswerer:
    """Answers by a transformers model, with the modules attached to it."""

    def __init__(self, model: PreTrainedModel, tokenizer: ChatTokenizer, cache: MakeCache = empty_cache) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cache = cache

    def answer(self, examples: Sequence[Example], limits: Sequence[int], report: Report) -> list[str]:
        """See `Answerer`."""
        prompts = [self._prompt(example) for example in examples]
        stop_ids = self._tokenizer.stop_ids
        answers = greedy(self._model, prompts, limits, stop_ids, cache=self._cache, report=report)
        return [self._tokenizer.decode(tokens) for tokens in answers]

    def generate_tokens(self, example: Example, tokens: int) -> None:
        """See `Answerer`."""
        greedy(self._model, [self._prompt(example)], [tokens], (), cache=self._cache)

    def _prompt(self, example: Example) -> list[int]:
        if example.prompt is not None:
            return self._tokenizer.encode_text(example.prompt)
        return self._tokenizer.encode_chat(example.messages[:-1], example.tools)


def quality(answerer: Answerer, examples: Sequence[Example], tokenizer: ChatTokenizer, report: Report) -> Score:
    """Scores the answers to all test examples."""
    texts = answerer.answer(examples, answer_limits(examples, tokenizer), report)
    return score(texts, [example.completion for example in examples])


def answer_limits(examples: Sequence[Example], tokenizer: ChatTokenizer) -> list[int]:
    """Maximum tokens per answer: 1.5 times its reference's, plus 8, so that a model that rambles costs little."""
    return [len(tokenizer.encode_text(example.completion)) * 3 // 2 + 8 for example in examples]


def token_seconds(answerers: Mapping[str, Answerer], example: Example, device: str) -> dict[str, float]:
    """Median seconds per token after the first, one answer at a time; every round measures each answerer."""

    def asking(answerer: Answerer, tokens: int) -> Callable[[], None]:
        return lambda: answerer.generate_tokens(example, tokens)

    variants = {
        f"{name} {tokens}": asking(answerer, tokens)
        for name, answerer in answerers.items()
        for tokens in (1, 1 + TIMED_TOKENS)
    }
    clock = time.perf_counter if device == "cuda" else time.process_time
    spent = interleaved(variants, Effort(seconds=0, rounds=ROUNDS), clock)
    return {name: (spent[f"{name} {1 + TIMED_TOKENS}"] - spent[f"{name} 1"]) / TIMED_TOKENS for name in answerers}
