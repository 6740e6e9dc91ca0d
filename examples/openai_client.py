"""What a product's backend does with loramill, with nothing but the `openai` package.

    OPENAI_BASE_URL=http://127.0.0.1:8400/v1 OPENAI_API_KEY=lm-… python examples/openai_client.py

Sends requests to a model in every form, uploads examples, and submits, follows and cancels a fine-tune job. The first
argument is the model's name. Default: the first model in the list, which is the base.
"""

import asyncio
import json
import sys
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam


def user(content: str) -> list[ChatCompletionMessageParam]:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


def generate(client: OpenAI, model: str) -> None:
    """Requests a whole answer, a stream, log probabilities, several answers, events, and plain completions."""
    hello = user("Say hello to the world.")
    answer = client.chat.completions.create(model=model, messages=hello, max_tokens=16)
    assert answer.usage is not None
    print("chat:", answer.choices[0].message.content, answer.usage.total_tokens, "tokens")

    stream = client.chat.completions.create(
        model=model, messages=hello, max_tokens=16, stream=True, stream_options={"include_usage": True}
    )
    print("stream:", end=" ")
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage is not None:
            print(f" ({chunk.usage.completion_tokens} tokens)")

    several = client.chat.completions.create(
        model=model, messages=hello, max_tokens=4, n=2, seed=7, logprobs=True, top_logprobs=1
    )
    for choice in several.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        print(f"choice {choice.index}:", [round(token.logprob, 2) for token in choice.logprobs.content])

    with client.chat.completions.stream(model=model, messages=hello, max_tokens=8) as events:
        print("events:", "".join(event.delta for event in events if event.type == "content.delta"))

    plain = client.completions.create(model=model, prompt=["Once upon", "There was"], max_tokens=8, temperature=0)
    print("completions:", [choice.text for choice in plain.choices])


async def generate_concurrently(model: str) -> None:
    """Sends four requests that share the engine's steps, two of them as streams."""
    async with AsyncOpenAI() as client:

        async def whole(word: str) -> str | None:
            messages = user(f"Tell me about {word}.")
            answer = await client.chat.completions.create(model=model, messages=messages, max_tokens=8)
            return answer.choices[0].message.content

        async def streamed(word: str) -> str:
            stream = await client.completions.create(model=model, prompt=word, max_tokens=8, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        answers = await asyncio.gather(whole("rain"), whole("snow"), streamed("A fog"), streamed("A storm"))
    print("async:", answers)


def first_model(client: OpenAI) -> str:
    """Lists the models and returns the first one's name."""
    models = [model.id for model in client.models.list()]
    print("models:", models)
    assert client.models.retrieve(models[0]).id == models[0]
    return models[0]


def fine_tune(client: OpenAI) -> None:
    """Uploads examples and submits a fine-tune job for them, which is then cancelled."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Where is parcel {number}?"},
                {"role": "assistant", "content": f"Parcel {number} is on its way."},
            ]
        }
        for number in range(32)
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("parcels.jsonl", content), purpose="fine-tune")
    assert client.files.retrieve(file.id).bytes == len(content) and client.files.content(file.id).read() == content
    assert file.id in [each.id for each in client.files.list(purpose="fine-tune")]

    base = client.models.list().data[0].id
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix="parcels",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        metadata={"why": "an example"},
        extra_body={"loramill": {"rank": 8}},
    )
    print("job:", job.id, job.status)
    assert job.id in [each.id for each in client.fine_tuning.jobs.list(limit=10)]
    assert client.fine_tuning.jobs.retrieve(job.id).metadata == {"why": "an example"}
    print("cancelled:", client.fine_tuning.jobs.cancel(job.id).status)
    for event in client.fine_tuning.jobs.list_events(job.id, limit=5):
        print("event:", event.message)
    print("checkpoints:", len(client.fine_tuning.jobs.checkpoints.list(job.id).data))


def fine_tune_on_preferences(client: OpenAI) -> None:
    """Uploads pairs of answers and submits a DPO job for them, which is then cancelled."""
    rows = [
        {
            "input": {"messages": user(f"Where is parcel {number}?")},
            "preferred_output": [{"role": "assistant", "content": f"Parcel {number} is on its way."}],
            "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
        }
        for number in range(32)
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("pairs.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=client.models.list().data[0].id,
        training_file=file.id,
        suffix="parcels",
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}},
    )
    assert job.method is not None and job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    print("dpo:", job.method.type, job.method.dpo.hyperparameters.beta, client.fine_tuning.jobs.cancel(job.id).status)


def catch_errors(client: OpenAI, model: str) -> None:
    """Invalid requests raise the `openai` package's own errors, with a message on how to correct them."""
    mistakes: dict[type[openai.APIStatusError], dict[str, Any]] = {
        openai.NotFoundError: {"model": "no-such-model"},
        openai.BadRequestError: {"model": model, "prediction": {"type": "content", "content": "Hello"}},
        openai.AuthenticationError: {"model": model, "extra_headers": {"Authorization": "Bearer lm-wrong"}},
    }
    for expected, mistake in mistakes.items():
        try:
            client.chat.completions.create(messages=user("Hello"), **mistake)
        except expected as error:
            assert isinstance(error.body, dict)
            print("error:", error.status_code, error.code, error.body["message"])
        else:
            raise AssertionError(f"no {expected.__name__} was raised")


def main() -> None:
    """Runs all of the above."""
    with OpenAI() as client:
        model = first_model(client)
        if len(sys.argv) > 1:
            model = sys.argv[1]
        generate(client, model)
        asyncio.run(generate_concurrently(model))
        fine_tune(client)
        fine_tune_on_preferences(client)
        catch_errors(client, model)


if __name__ == "__main__":
    main()
