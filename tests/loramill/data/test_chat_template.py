"""Chat templates of real models: rendered as transformers renders them, or refused with the reason."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loramill.data.chat_template import dialect
from loramill.data.encoding import encode_example, training_problem
from loramill.data.examples import Example
from loramill.data.messages import Message
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import BaseUnusable, InvalidRequest

from ...chat_templates import CHATML, DEEPSEEK_R1, FAMILIES, GRANITE3, PARTS_ONLY, QWEN25
from ...hermes import SETTINGS, hermes_tokenizer, write_hermes_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town, é.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALL: Any = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"town": "Tromsø"}}}
CONVERSATIONS: dict[str, list[Message]] = {
    "user": [{"role": "user", "content": " Hi é "}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello.\n"},
        {"role": "user", "content": "And?"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"degrees": -3}', "tool_call_id": "abcdefghi", "name": "weather"},
    ],
}
BOS = {"bos_token": "<|im_start|>"}


def tokenizer_of(template: object) -> ChatTokenizer:
    return ChatTokenizer(hermes_tokenizer().to_str(), {**SETTINGS, **BOS, "chat_template": template}, {})


def oracle_of(template: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=hermes_tokenizer(), eos_token="<|im_end|>", pad_token="<pad>", chat_template=template, **BOS
    )


def chat_example(*contents: str) -> Example:
    turns = tuple(Message(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(contents))
    return Example(messages=turns, prompt=None, completion=contents[-1], line=1)


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("tools", [(), (TOOL,)], ids=["", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_rendered_as_transformers_renders_them(
    family: str, conversation: str, tools: tuple[Any, ...], answer: bool
) -> None:
    tokenizer, messages = tokenizer_of(FAMILIES[family]), CONVERSATIONS[conversation]
    inputs: list[Any] = json.loads(json.dumps(messages))
    if family == "deepseek-r1" and conversation == "tools":  # its template joins the arguments as text
        inputs[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"town": "Tromsø"}, ensure_ascii=False)
    try:
        expected = oracle_of(FAMILIES[family]).apply_chat_template(
            inputs, tools=list(tools) or None, add_generation_prompt=answer, tokenize=False
        )
    except Exception as error:  # noqa: BLE001 - a template's own error; ours must contain it
        with pytest.raises(InvalidRequest) as caught:
            tokenizer.render(messages, add_generation_prompt=answer, tools=tools)
        assert str(error) in caught.value.message
        return
    if family == "phi" and conversation == "tools":
        return  # it has no role for tool results, which the tokenizer refuses first
    assert tokenizer.render(messages, add_generation_prompt=answer, tools=tools) == expected


def test_families_that_support_tools() -> None:
    found = {family: tokenizer_of(template) for family, template in FAMILIES.items()}
    # Serving requires calls that can be parsed; training takes any format that the template writes.
    assert {family for family, each in found.items() if each.supports_tool_calls} == {"qwen2.5", "qwen3"}
    assert {family for family, each in found.items() if each.renders_tool_calls} == {
        "llama3",
        "mistral-v3",
        "qwen2.5",
        "qwen3",
    }


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "phi"])
def test_families_can_be_trained(family: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    assert (tokenizer.chat_problem, training_problem(tokenizer)) == (None, None)
    encoded = encode_example(tokenizer, chat_example("Hi", "Hello."))
    assert list(encoded.tokens[: encoded.prompt_length]) == tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    answer = tokenizer.decode(encoded.tokens[encoded.prompt_length :])
    assert answer.strip() == ("<think>\n\n</think>\n\nHello." if family == "qwen3" else "Hello.")


# Dates


def test_a_date_is_todays_or_that_of_the_submission() -> None:
    tokenizer, question = tokenizer_of(GRANITE3), [Message(role="user", content="Hi")]
    assert f"Today's Date: {datetime.now(UTC):%B %d, %Y}." in tokenizer.render(question, add_generation_prompt=True)
    submitted = tokenizer.at_time(datetime(2024, 2, 29, 23, 59, tzinfo=UTC))
    assert "Today's Date: February 29, 2024." in submitted.render(question, add_generation_prompt=True)
    assert encode_example(submitted, chat_example("Hi", "Ho")) == encode_example(submitted, chat_example("Hi", "Ho"))
    assert submitted.encode_chat(question) != tokenizer.encode_chat(question)


# Prompts that open the reasoning


@pytest.mark.parametrize(
    ("written", "trained"),
    [
        ("Hello.", "Hello."),
        ("<think>\nHm.\n</think>\n\nHello.", "Hm.\n</think>\n\nHello."),
        ("\n<think>Hm.</think>Hello.", "Hm.</think>Hello."),
        ("Hm.\n</think>\n\nHello.", "Hm.\n</think>\n\nHello."),  # the form in which this base's answers are served
        ("<|im_end|>", "<|im_end|>"),
    ],
)
@pytest.mark.parametrize(
    "template", [DEEPSEEK_R1, CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")]
)
def test_an_answer_is_trained_after_the_prompt_that_opens_its_reasoning(
    template: str, written: str, trained: str
) -> None:
    tokenizer, question = tokenizer_of(template), Message(role="user", content="Hi")
    assert tokenizer.render([question], add_generation_prompt=True).endswith("<think>\n")
    encoded = encode_example(tokenizer, chat_example("Hi", written))
    assert list(encoded.tokens[: encoded.prompt_length]) == tokenizer.encode_chat([question])
    answer = encoded.tokens[encoded.prompt_length :]
    assert list(answer) == [*tokenizer.encode_text(trained), tokenizer.stop_ids[0]]


def test_a_tool_call_is_trained_after_a_prompt_that_opens_its_reasoning() -> None:
    template = QWEN25.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    tokenizer, messages = tokenizer_of(template), CONVERSATIONS["tools"][:2]
    encoded = encode_example(tokenizer, Example(tuple(messages), None, "", 1, tools=(TOOL,)))
    prompt, answer = encoded.tokens[: encoded.prompt_length], encoded.tokens[encoded.prompt_length :]
    assert list(prompt) == tokenizer.encode_chat(messages[:1], [TOOL])
    call = '<tool_call>\n{"name": "weather", "arguments": {"town": "Tromsø"}}\n</tool_call>'
    assert tokenizer.decode(answer) == call


# Contents


def test_templates_that_read_only_parts_get_parts() -> None:
    tokenizer = tokenizer_of(PARTS_ONLY)
    messages = CONVERSATIONS["system"] + CONVERSATIONS["turns"][1:]
    inputs = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    oracle = oracle_of(PARTS_ONLY).apply_chat_template(inputs, add_generation_prompt=True, tokenize=False)
    assert tokenizer.render(messages, add_generation_prompt=True) == oracle
    assert "Be brief." in oracle and "And?" in oracle
    assert training_problem(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}", "drops the content of assistant and user"),
        ("{{ messages[-1].content }}", "drops the content of assistant messages"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "drops the content of assistant and user"),
        ("{% for %}", "has an error"),
    ],
)
def test_a_template_that_drops_messages_is_refused(template: str, message: str) -> None:
    with pytest.raises(BaseUnusable, match=message):
        tokenizer_of(template)


def test_system_messages_that_a_template_drops_are_refused() -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of(template)
    tokenizer.encode_chat(CONVERSATIONS["user"])
    with pytest.raises(InvalidRequest, match="drops system messages") as caught:
        tokenizer.encode_chat(CONVERSATIONS["system"])
    assert caught.value.param == "messages[0].role"


def test_developer_becomes_system_if_the_template_lacks_the_role() -> None:
    messages = CONVERSATIONS["system"]
    conversation = [Message(role="developer", content="Be brief."), messages[1]]
    assert tokenizer_of(CHATML).encode_chat(conversation) == tokenizer_of(CHATML).encode_chat(messages)
    own_role = CHATML.replace("message['role'] +", "('DEV' if message['role'] == 'developer' else message['role']) +")
    assert "DEV\nBe brief." in tokenizer_of(own_role).render(conversation, add_generation_prompt=True)


def test_names_are_passed_to_the_template() -> None:
    named = CHATML.replace("message['role'] +", "message['role'] + (message.name or '') +")
    messages = [Message(role="user", content="Hi", name="ann<|im_end|>")]
    assert "<|im_start|>userann" in tokenizer_of(named).render(messages, add_generation_prompt=True)
    tokens = tokenizer_of(named).encode_chat(messages)
    assert tokens.count(tokenizer_of(named).stop_ids[0]) == 1
    assert tokenizer_of(CHATML).encode_chat(messages) == tokenizer_of(CHATML).encode_chat(
        [Message(role="user", content="Hi")]
    )


def test_special_tokens_stay_text_in_ascii_json() -> None:
    template = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=true) }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of(template)
    text = "é\U00010000 <|im_end|> \\ud800"
    rendered = tokenizer.render([Message(role="user", content=text)], add_generation_prompt=True).replace("\ud800", "")
    assert rendered == json.dumps(text) + "<|im_end|>"
    assert tokenizer.encode_chat([Message(role="user", content=text)]).count(tokenizer.stop_ids[0]) == 1


# Where templates are found


def folder_with(tmp_path: Path, **files: str) -> Path:
    write_hermes_tokenizer(tmp_path)
    settings = {key: value for key, value in SETTINGS.items() if key != "chat_template"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


ONE, TWO = CHATML, CHATML.replace("assistant\n", "bot\n")
LISTED = [{"name": "default", "template": ONE}, {"name": "tool_use", "template": QWEN25}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template_json": json.dumps({"chat_template": TWO})}, TWO),
        ({"tokenizer_config_json": json.dumps({**SETTINGS, "chat_template": ONE})}, ONE),
        (
            {
                "chat_template_json": json.dumps({"chat_template": TWO}),
                "tokenizer_config_json": json.dumps({**SETTINGS, "chat_template": ONE}),
            },
            ONE,
        ),
        (
            {"chat_template_jinja": TWO, "tokenizer_config_json": json.dumps({**SETTINGS, "chat_template": ONE})},
            TWO,
        ),
        ({"tokenizer_config_json": json.dumps({**SETTINGS, "chat_template": LISTED})}, ONE),
    ],
)
def test_files_that_contain_the_template(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    loaded = ChatTokenizer.load(folder_with(tmp_path, **files))
    assert loaded.encode_chat(CONVERSATIONS["user"]) == tokenizer_of(expected).encode_chat(CONVERSATIONS["user"])


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_json": json.dumps({**SETTINGS, "chat_template": LISTED})},
        {"chat_template_jinja": ONE, "additional_chat_templates__tool_use_jinja": QWEN25},
    ],
)
def test_the_tool_template_is_used_if_there_are_tools(tmp_path: Path, files: dict[str, str]) -> None:
    loaded = ChatTokenizer.load(folder_with(tmp_path, **files))
    messages = CONVERSATIONS["tools"]
    assert loaded.supports_tool_calls
    assert loaded.encode_chat(messages, [TOOL]) == tokenizer_of(QWEN25).encode_chat(messages, [TOOL])
    assert loaded.encode_chat(CONVERSATIONS["user"]) == tokenizer_of(ONE).encode_chat(CONVERSATIONS["user"])


def test_a_damaged_template_file(tmp_path: Path) -> None:
    with pytest.raises(BaseUnusable, match="chat template can't be read"):
        ChatTokenizer.load(folder_with(tmp_path, chat_template_json="{}"))


# Unusable templates, and templates that never end


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "it has no chat template"),
        ("{{ raise_exception('images only') }}", "refuses every conversation: images only"),
        ("{{ load_image() }}", "refuses every conversation: 'load_image' is undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_base_that_cannot_chat_has_a_reason(template: str, problem: str) -> None:
    tokenizer = tokenizer_of(template)
    assert problem in (tokenizer.chat_problem or "") and problem in (training_problem(tokenizer) or "")
    with pytest.raises(InvalidRequest):
        tokenizer.encode_chat(CONVERSATIONS["user"])


def test_a_base_that_cannot_train_on_conversations_has_a_reason() -> None:
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", ""))
    assert tokenizer.chat_problem is None
    assert "never learn to stop" in (training_problem(tokenizer) or "")


@pytest.mark.parametrize(
    "evil",
    [
        "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{% set n = namespace(s='xxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='xxxx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_an_endless_template_is_stopped(evil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A twentieth of the bound: two million calls of a macro take 15 seconds.
    monkeypatch.setattr(dialect, "MAX_STEPS", 100_000)
    tokenizer = tokenizer_of("{% if messages[0].content == 'evil' %}" + evil + "{% endif %}" + CHATML)
    with pytest.raises(InvalidRequest, match="refuses this"):
        tokenizer.encode_chat([Message(role="user", content="evil")])
