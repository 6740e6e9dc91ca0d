"""Questions to the gateway, and the token limits of their answers."""

from __future__ import annotations

import json

import httpx
import pytest
from openai import AsyncOpenAI

from loramill.data.encoding import encode_example
from loramill.data.examples import read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import ModelNotFound
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, answer_all, build_questions
from loramill.serve.api.schemas.chat import ChatRequest

#: A sentence in many scripts; a limit by characters (2 of 3, and 8) cut the right answer in ja, zh, ko, th and hi.
SENTENCES = {
    "ja": "赤の品は一番倉庫の棚にあります。明日の午前中に発送いたします。",
    "zh": "您的包裹已经到达上海仓库,明天上午会送到您手中。",
    "ko": "주문하신 상품은 내일 오전에 도착할 예정입니다.",
    "th": "สินค้าของคุณจะถูกจัดส่งในวันพรุ่งนี้ตอนเช้า",
    "hi": "आपका सामान कल सुबह पहुँच जाएगा।",
    "ar": "ستصل طلبيتك غدا في الصباح الباكر.",
    "he": "ההזמנה שלך תגיע מחר בבוקר.",
    "km": "ទំនិញរបស់អ្នកនឹងមកដល់ព្រឹកស្អែក។",
    "my": "သင့်ပစ္စည်းသည် မနက်ဖြန်ရောက်ပါမည်။",
    "ru": "Ваш заказ прибудет завтра утром.",
    "de": "Ihre Bestellung trifft morgen früh ein.",
    "en": "Your order arrives tomorrow morning.",
    "en+ja": "Please bring 赤の品 to 一番倉庫 by 9:00.",
    "emoji": "🎉👍🏽👨‍👩‍👧🇩🇪🚀",
}


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_right_answer_is_never_cut(language: str, kind: str, tokenizer: ChatTokenizer) -> None:
    text = SENTENCES[language]
    row = {
        "chat": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]},
        "completion": {"prompt": "Q", "completion": text},
    }[kind]
    examples = read_examples(json.dumps(row).encode(), "one.jsonl").examples
    (question,) = build_questions("acme/a", examples, tokenizer)
    encoded = encode_example(tokenizer, examples[0])
    needed = len(encoded.tokens) - encoded.prompt_length
    assert needed < question.max_tokens <= 2 * needed + 8


def test_questions_with_tools_have_the_trained_format(tokenizer: ChatTokenizer) -> None:
    """The gateway gets the file's own form, and calls are compared without regard to white space in their JSON."""
    function = {"name": "parcel", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}}
    call = {"id": "c1", "type": "function", "function": {"name": "parcel", "arguments": '{"id":"7", "at": 1}'}}
    messages = [
        {"role": "user", "content": "Where are both parcels?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "in Rome", "tool_call_id": "c1"},
        {"role": "assistant", "content": "One is in Rome.", "tool_calls": [call]},
    ]
    row = {"messages": messages, "tools": [{"type": "function", "function": function}]}
    examples = read_examples(json.dumps(row).encode(), "one.jsonl").examples
    sent: list[ChatRequest] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(ChatRequest.model_validate_json(request.content))
        again = {**call, "function": {"name": "parcel", "arguments": '{"at": 1, "id": "7"}'}}
        message = {"role": "assistant", "content": "One is in Rome.", "tool_calls": [again]}
        choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
        return httpx.Response(200, json={"id": "c", "object": "chat.completion", "created": 0, "choices": [choice]})

    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    client = AsyncOpenAI(base_url="http://gateway/v1", api_key="k", http_client=http, max_retries=0)
    assert answer_all(client, build_questions("acme/a", examples, tokenizer)) == [EvalAnswer(examples[0].completion)]
    encoded = encode_example(tokenizer, examples[0])
    served = tokenizer.encode_chat(
        [each.to_template() for each in sent[0].messages], [tool.to_template() for tool in sent[0].tools]
    )
    assert served == list(encoded.tokens[: encoded.prompt_length])


def test_a_refused_question_does_not_affect_the_others() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["model"] == "acme/gone":
            error = {"message": "The model 'acme/gone' does not exist.", "code": "model_not_found", "param": "model"}
            return httpx.Response(404, json={"error": error})
        ended = "length" if body["max_tokens"] == 5 else "stop"
        choice = {"index": 0, "finish_reason": ended, "text": f"{body['prompt']} {body['max_tokens']}"}
        return httpx.Response(200, json={"id": "c", "object": "text_completion", "created": 0, "choices": [choice]})

    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    client = AsyncOpenAI(base_url="http://gateway/v1", api_key="k", http_client=http, max_retries=0)
    questions = [
        EvalQuestion("acme/a", (), "one", 3),
        EvalQuestion("acme/gone", (), "two", 4),
        EvalQuestion("acme/a", (), "x", 5),
    ]
    done: list[int] = []
    first, gone, last = answer_all(client, questions, report=done.append)
    assert (first, last, done) == (EvalAnswer("one 3"), EvalAnswer("x 5", truncated=True), [1, 2, 3])
    assert isinstance(gone, ModelNotFound) and gone.message == "The model 'acme/gone' does not exist."
