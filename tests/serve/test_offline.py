"""Prompts without a gateway, on a tiny random model with the real tokenizer: against transformers, PEFT and itself."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import (
    ContextLengthExceeded,
    DatasetInvalid,
    EngineFault,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from loramill.models.catalog import Base, find_base
from loramill.serve import offline
from loramill.serve.offline import OfflineCompletion, OfflineEngine, PromptFile, build_request
from loramill.serve.protocol import TextRequest
from loramill.serve.sampling_params import SamplingParams
from loramill.settings import ServeSettings

from ..llama import tiny_llama, write_base


def sampled(request: TextRequest, **params: Any) -> TextRequest:
    """A request with other sampling parameters."""
    return replace(request, sampling_params=replace(request.sampling_params, **params))


LIKE = TextRequest("", "", sampling_params=SamplingParams(max_tokens=8))
SETTINGS = ServeSettings(max_sequences=4, kv_tokens=2048)


def random_model() -> LlamaForCausalLM:
    model = tiny_llama(torch.bfloat16, vocab_size=49152, initializer_range=0.4)
    # Few tokens are possible, so that rounding to bfloat16 seldom decides between two.
    for rows in (slice(0, 1000), slice(1016, None)):
        model.lm_head.weight.data[rows] = 0
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Base:
    folder = write_base(tmp_path_factory.mktemp("bases") / "tiny", random_model(), tokenizer=base.folder)
    return find_base(str(folder), folder.parent / "cache")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("adapters") / name for name in ("one", "two")}
    for seed, folder in enumerate(folders.values()):
        model = random_model()
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def gate() -> threading.Event:
    """Until it is set, loading the version "stuck" blocks."""
    return threading.Event()


@pytest.fixture(scope="module")
def engine(tiny: Base, adapters: dict[str, Path], gate: threading.Event) -> Iterator[OfflineEngine]:
    def source(version: str) -> Path:
        if version == "stuck":
            gate.wait(60)
            return adapters["one"]
        if version not in adapters:
            raise ModelNotFound(f"There is no {version}.")
        return adapters[version]

    with OfflineEngine(tiny, source, SETTINGS) as engine:
        yield engine
        gate.set()


def prompts(count: int, **changes: Any) -> list[TextRequest]:
    return [replace(build_request(f"Number {n}?", LIKE, chat=n % 2 == 0), id=str(n), **changes) for n in range(count)]


def by_transformers(folder: Path | None, request: TextRequest, tokenizer: ChatTokenizer) -> str:
    """The greedy answer up to the first token that rounding to bfloat16 may change."""
    model: Any = random_model().float()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    tokens = tokenizer.encode_chat(request.messages) if request.messages else tokenizer.encode_text(str(request.prompt))
    ids = torch.tensor([tokens])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.sampling_params.max_tokens,
        do_sample=False,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.scores).topk(2).values
    close = (best[:, 0] - best[:, 1] < 0.15 * best[:, 0].abs()).tolist()
    clear = close.index(True) if True in close else len(close)
    return tokenizer.decode(out.sequences[0, len(tokens) : len(tokens) + clear].tolist())


def test_answers_of_mixed_versions_are_those_of_transformers(
    engine: OfflineEngine, adapters: dict[str, Path], tokenizer: ChatTokenizer
) -> None:
    requests = [replace(each, version=(None, "one", "two")[n % 3]) for n, each in enumerate(prompts(9))]
    completions = list(engine.generate(requests, ordered=True))
    assert [each.request for each in completions] == requests
    expected = [by_transformers(adapters.get(each.version or ""), each, tokenizer) for each in requests]
    for each, text in zip(completions, expected, strict=True):
        assert each.text.startswith(text)
    assert sum(map(len, expected)) > 100
    assert {each.finish for each in completions} == {"length"} and {each.completion_tokens for each in completions} == {
        8
    }


def test_it_loads_smollm2_and_answers_as_transformers_does(base: Base, tokenizer: ChatTokenizer) -> None:
    question = sampled(build_request("What is the capital of France?", LIKE, chat=True), max_tokens=12)
    with OfflineEngine(base, Path, ServeSettings(kv_tokens=1024)) as engine:
        (completion,) = engine.generate([question])
    assert completion.text == "The capital of France is Paris."
    assert completion.finish == "stop"
    assert (completion.prompt_tokens, completion.completion_tokens) == (
        len(tokenizer.encode_chat(question.messages)),
        7,
    )


def test_answers_are_yielded_when_complete_unless_ordered(engine: OfflineEngine) -> None:
    requests = [
        sampled(replace(each, ignore_eos=True), max_tokens=100 if n == 0 else 2) for n, each in enumerate(prompts(4))
    ]
    free = [each.request.id for each in engine.generate(iter(requests))]
    assert sorted(free) == ["0", "1", "2", "3"] and free[-1] == "0"
    assert [each.request.id for each in engine.generate(iter(requests), ordered=True)] == ["0", "1", "2", "3"]


def test_a_failing_prompt_fails_alone(engine: OfflineEngine) -> None:
    good = prompts(6)
    requests = [
        replace(good[0], version="none"),
        replace(good[1], version="one"),
        replace(good[2], messages=(), prompt="word " * 300),
        replace(good[3], prompt="", messages=()),
        replace(good[4], version="none"),
        replace(good[5], messages=({"role": "unknown", "content": ""},), prompt=None),
        sampled(replace(good[0], id="good id"), top_p=7.0),
        good[2],
    ]
    completions = list(engine.generate(requests, ordered=True))
    assert [type(each.error) for each in completions] == [
        ModelNotFound,
        type(None),
        ContextLengthExceeded,
        InvalidRequest,
        ModelNotFound,
        InvalidRequest,
        InvalidRequest,
        type(None),
    ]
    assert completions[1].text and completions[7].text
    assert [each.request for each in completions] == requests


@pytest.mark.parametrize("ordered", [True, False])
def test_only_a_window_of_prompts_and_answers_is_held(
    engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    monkeypatch.setattr(offline, "_MAX_IN_FLIGHT", 8)
    read = 0

    def endless() -> Iterator[TextRequest]:
        nonlocal read
        for number in range(10**9):
            read += 1
            # The first is slow: in order, the others wait for it.
            yield sampled(
                replace(LIKE, id="same", prompt=f"{number}", ignore_eos=True), max_tokens=60 if number == 0 else 1
            )

    completions = engine.generate(endless(), ordered=ordered)
    for yielded in range(60):
        next(completions)
        assert read <= yielded + 8
    completions.close()  # type: ignore[attr-defined]  # our iterator has a generator's close
    assert next(iter(engine.generate(prompts(1)))).text


def test_closing_the_iterator_drops_what_is_left(engine: OfflineEngine) -> None:
    completions = engine.generate([*prompts(1), *prompts(3, version="stuck")])
    assert next(completions).text
    completions.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 20
    while engine._replica.stats().waiting:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_more_prompts_than_may_wait_in_the_engine(engine: OfflineEngine, gate: threading.Event) -> None:
    requests = [sampled(each, max_tokens=1) for each in prompts(1300, version="stuck")]
    timer = threading.Timer(1.0, gate.set)
    timer.start()
    completions = list(engine.generate(requests, ordered=True))
    assert [each.request for each in completions] == requests
    assert not [each.error for each in completions if each.error]


def test_stop_strings_seeds_and_logprobs(engine: OfflineEngine) -> None:
    whole = next(engine.generate(prompts(1))).text
    assert len(whole) > 6
    cut = next(engine.generate(prompts(1, stop=(whole[4:6],))))
    assert (cut.text, cut.finish) == (whole[: whole.index(whole[4:6])], "stop")
    warm = [sampled(each, temperature=1.0, seed=5) for each in prompts(1)]
    assert next(engine.generate(warm)).text == next(engine.generate(warm)).text != whole
    completion = next(engine.generate([sampled(each, logprobs=2) for each in prompts(1)]))
    assert len(completion.logprobs) == completion.completion_tokens
    assert all(entry.top[0] == entry.token for entry in completion.logprobs)


def test_an_error_of_the_prompts_reaches_the_caller(engine: OfflineEngine) -> None:
    def broken() -> Iterator[TextRequest]:
        yield from prompts(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.generate(broken()))
    assert len(list(engine.generate(prompts(2)))) == 2
    assert list(engine.generate([])) == []


def test_it_works_within_an_event_loop(engine: OfflineEngine) -> None:
    async def inside() -> list[OfflineCompletion]:
        return list(engine.generate(prompts(2)))

    assert len(asyncio.run(inside())) == 2


def test_an_engine_that_stopped_is_reported(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with OfflineEngine(tiny, Path, SETTINGS) as engine:

        def fail() -> None:
            raise EngineFault("broken")

        engine._replica._engine.step = fail  # type: ignore[method-assign,assignment]
        with pytest.raises(Unavailable, match="has stopped"):
            list(engine.generate(prompts(3)))


def file(folder: Path, name: str, *rows: object) -> Path:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_prompts(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": "So."}
    read = PromptFile(
        file(
            tmp_path,
            "prompts.jsonl",
            "\ufeff" + json.dumps({"prompt": "Once"}),
            "",
            {"messages": [question], "id": "a", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4},
            {"prompt": "Twice", "completion": " upon", "seed": 0, "stop": "."},
            {"messages": [question, answer], "stop": ["a", "b"], "temperature": 0},
            {"messages": [question, answer, question]},
        ),
        sampled(LIKE, temperature=1.0),
    )
    like = sampled(LIKE, temperature=1.0)
    assert len(read) == 5
    expected = [
        replace(like, id="1", prompt="Once"),
        sampled(replace(like, id="a", messages=(question,)), max_tokens=3, temperature=0.5, top_p=0.9, top_k=4),
        sampled(replace(like, id="4", prompt="Twice", stop=(".",)), seed=0),
        sampled(replace(like, id="5", messages=(question,), stop=("a", "b")), temperature=0.0),
        replace(like, id="6", messages=(question, answer, question)),
    ]
    assert list(read) == list(read) == expected
    chat = PromptFile(file(tmp_path, "one.jsonl", {"prompt": "Why?"}), LIKE, chat=True)
    assert list(chat) == [replace(LIKE, id="1", messages=(question,))]


def test_lines_of_openais_training_format_are_prompts(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    line = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hi", "name": "ann", "refusal": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "Two.", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": False,
    }
    [request] = PromptFile(file(tmp_path, "prompts.jsonl", line), LIKE)
    assert request.messages == (
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    )
    assert [tool["function"]["name"] for tool in request.tools] == ["f"]


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = file(tmp_path, "prompts.txt", " Why? \r", "", '{"prompt"')
    requests = [" Why? ", '{"prompt"']
    assert [each.messages[0]["content"] for each in PromptFile(path, LIKE)] == requests
    assert [(each.id, each.prompt) for each in PromptFile(path, LIKE, chat=False)] == [
        ("1", requests[0]),
        ("3", requests[1]),
    ]


def test_all_problems_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "bad.jsonl",
        {"prompt": "good"},
        "{",
        {"prompt": 3},
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {},
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "unknown", "content": "b"}]},
        {"prompt": "a", "temprature": 1},
        {"prompt": "a", "max_tokens": 0},
        {"messages": [{"role": "user", "content": "b"}], "completion": "c"},
    )
    with pytest.raises(DatasetInvalid) as raised:
        PromptFile(path, LIKE)
    assert raised.value.message.startswith("bad.jsonl has 9 problems:\nbad.jsonl, line 2: ")
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        f"bad.jsonl, line {line}" for line in range(2, 11)
    ]
    message = "\n".join(raised.value.problems)
    for word in (
        "JSON",
        "line 3: prompt: ",
        'either "prompt" or "messages"',
        "messages[0].role",
        "temprature",
        "max_tokens",
    ):
        assert word in message


def test_files_without_prompts_or_of_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"empty\.txt has no prompts"):
        PromptFile(file(tmp_path, "empty.txt", "", " "), LIKE)
    (tmp_path / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(DatasetInvalid, match=r"latin\.txt, line 2: byte 4 is not UTF-8"):
        PromptFile(tmp_path / "latin.txt", LIKE)
    with pytest.raises(DatasetInvalid, match=r"has 30 problems; the first 20:"):
        PromptFile(file(tmp_path, "many.jsonl", *["{"] * 30), LIKE)
