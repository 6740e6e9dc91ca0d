"""The loss on references through a real gateway with the real SmolLM2, against the model's own forward pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI

from loramill.data.encoding import encode_example
from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import EngineFault, ModelNotFound
from loramill.models.catalog import Base, load_for_training
from loramill.pipelines.nightly.questions import EvalAnswer, answer_all, build_loss_questions, build_questions
from loramill.registry import Registry, api_keys
from loramill.serve.api.app import build_api
from loramill.serve.replica.replica import Replica
from loramill.settings import ServeSettings, Settings

from ....databases import create_sqlite_database
from ....gateways import running

ROWS = (
    {"messages": [{"role": "user", "content": "Name a color."}, {"role": "assistant", "content": "Blue."}]},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!", "weight": 1},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "The capital of France is Paris.", "weight": 0},
        ]
    },
)


def no_adapters(version: str) -> Any:
    raise ModelNotFound(version)


def read(row: dict[str, Any]) -> Example:
    return read_examples(json.dumps(row).encode(), "one.jsonl").examples[0]


@pytest.fixture
def gateway(base: Base, tokenizer: ChatTokenizer, tmp_path: Path) -> Iterator[AsyncOpenAI]:
    settings = Settings(home=tmp_path, cache=tmp_path)
    create_sqlite_database(settings.database)
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        _, key = api_keys.create(session, None)
    replica = Replica(base, no_adapters, ServeSettings(device="cpu", threads=1, kv_tokens=2048))
    app = build_api(registry=registry, base=base, tokenizer=tokenizer, backend=replica, settings=settings)
    with running(app) as url:
        yield AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=httpx.AsyncClient())
    replica.close()
    registry.close()


def test_the_loss_is_that_of_the_model(gateway: AsyncOpenAI, base: Base, tokenizer: ChatTokenizer) -> None:
    examples = [*map(read, ROWS), read({"prompt": "The capital of France is", "completion": " Paris."})]
    found = answer_all(
        gateway,
        [*build_loss_questions(base.name, examples, tokenizer), *build_questions(base.name, examples, tokenizer)],
    )
    losses = [each.loss for each in found if isinstance(each, EvalAnswer)]
    assert losses[3:] == [None] * 3 and all(each.text for each in found[3:] if isinstance(each, EvalAnswer))
    model = load_for_training(base, torch.float32)
    for example, loss in zip(examples[:1] + examples[2:], losses[:1] + losses[2:3], strict=True):
        encoded = encode_example(tokenizer, example, "only_last")
        tokens = torch.tensor([encoded.tokens])
        with torch.no_grad():
            logits = model(tokens).logits[0, encoded.prompt_length - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, tokens[0, encoded.prompt_length :]).item()
        assert loss == pytest.approx(expected, abs=0.05), example
    # A weight is for training; the last answer is evaluated all the same.
    assert losses[1] is not None and 0 < losses[1] < losses[0]


def test_an_echo_without_all_tokens_has_no_loss(tokenizer: ChatTokenizer) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        logprobs = {"tokens": [], "token_logprobs": [None, -1.0], "top_logprobs": [], "text_offset": []}
        choice = {"index": 0, "finish_reason": "length", "text": "", "logprobs": logprobs}
        return httpx.Response(200, json={"id": "c", "object": "text_completion", "created": 0, "choices": [choice]})

    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    client = AsyncOpenAI(base_url="http://gateway/v1", api_key="k", http_client=http, max_retries=0)
    (found,) = answer_all(client, build_loss_questions("acme/a", [read(ROWS[0])], tokenizer))
    assert isinstance(found, EngineFault) and "echoed 2 of" in found.message
