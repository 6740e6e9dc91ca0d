"""The judge against a real HTTP server."""

from __future__ import annotations

import json
import socket

import pytest

from loramill.data.examples import read_examples
from loramill.errors import EvaluationError, SettingsInvalid, Unavailable
from loramill.pipelines.nightly.definition import JudgeDefinition
from loramill.pipelines.nightly.evaluation.items import AnsweredExample
from loramill.pipelines.nightly.evaluation.judge import AGAIN, judge, read_score

from .judges import judging

ROW = {"messages": [{"role": "user", "content": "Name {answer}."}, {"role": "assistant", "content": "Blue"}]}


def answered(*answers: str) -> list[AnsweredExample]:
    example = read_examples(json.dumps(ROW).encode(), "one.jsonl").examples[0]
    return [AnsweredExample(example, answer) for answer in answers]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 0.7),
        ("10", 1.0),
        ("Score: 8/10.", 0.8),
        ("I rate it 8 out of 10.", 0.8),
        ("6.5 of 10", 0.65),
        ("Score: -5", None),
        ("-5", None),
        ("The answer has 3 faults out of 12, so 4.5", 0.45),
        ("<think>perhaps 9</think>\n2", 0.2),
        ("0", 0.0),
        ("11", None),
        ("good", None),
        ("2026-11-30 100", None),
        ("", None),
    ],
)
def test_the_last_number_from_0_to_10_is_the_score(text: str, score: float | None) -> None:
    found = read_score(text)
    assert found == (None if score is None else pytest.approx(score))


def test_each_prompt_is_judged_once_with_key_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with judging(lambda body: (200, "10" if "<answer>\nBlue\n" in body["messages"][0]["content"] else "3")) as server:
        definition = JudgeDefinition(url=server.url, model="big", api_key="${JUDGE_KEY}", options={"seed": 7})
        assert judge(definition, answered("Blue", "Red", "Blue", "{reference}")) == [1.0, 0.3, 1.0, 0.3]
    assert len(server.bodies) == 3 and server.keys == {"Bearer secret"}
    assert all((body["model"], body["seed"]) == ("big", 7) and "temperature" not in body for body in server.bodies)
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert all("user: Name {answer}." in prompt and "<reference>\nBlue\n" in prompt for prompt in prompts)
    assert any("<answer>\n{reference}\n" in prompt for prompt in prompts)


def test_one_s_own_prompt_is_used() -> None:
    with judging(lambda body: (200, "5" if body["messages"][0]["content"] == "Grade Red!" else "no")) as server:
        definition = JudgeDefinition(url=server.url, model="m", prompt="Grade {answer}!")
        assert judge(definition, answered("Red")) == [0.5]
    assert server.bodies[0]["temperature"] == 0


def test_a_judge_without_a_score_gets_a_second_request_and_then_fails() -> None:
    with judging(lambda body: (200, "6" if body["messages"][-1]["content"] == AGAIN else "Fine.")) as server:
        assert judge(JudgeDefinition(url=server.url, model="m"), answered("Red")) == [0.6]
        server.grade = lambda body: (200, "Fine.")
        with pytest.raises(EvaluationError, match=r"judge m gave no score from 0 to 10, but 'Fine\.'"):
            judge(JudgeDefinition(url=server.url, model="m"), answered("Red"))


def test_a_busy_judge_is_tried_again() -> None:
    refused: list[str] = []

    def grade(body: dict) -> tuple[int, str]:
        prompt = body["messages"][0]["content"]
        if refused.count(prompt) < 2:
            refused.append(prompt)
            return (429, 503)[len(refused) % 2], "busy"
        return 200, "9"

    with judging(grade) as server:
        assert judge(JudgeDefinition(url=server.url, model="m"), answered("Red", "Blue"), retries=3) == [0.9, 0.9]
    assert len(server.bodies) == 6


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, Unavailable), (429, Unavailable), (401, SettingsInvalid), (404, SettingsInvalid), (400, EvaluationError)],
)
def test_each_refusal_has_its_error(status: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "x")
    with judging(lambda body: (status, "no such thing")) as server:
        monkeypatch.setenv("JUDGE", server.url)
        with pytest.raises(error, match=r"The judge m at \$\{JUDGE\}") as caught:
            judge(JudgeDefinition(url="${JUDGE}", model="m"), answered("Red"), retries=0)
    assert server.url not in str(caught.value)


def test_an_unreachable_judge_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(Unavailable, match="does not answer"):
        judge(JudgeDefinition(url=url, model="m"), answered("Red"), retries=0)


@pytest.mark.parametrize("page", ["<html>log in</html>", "", "[]", '{"choices": [{}]}'])
def test_an_endpoint_in_another_format_is_named_as_the_fault(page: str) -> None:
    with judging(lambda _: (200, page), as_it_is=True) as server:
        definition = JudgeDefinition(url=server.url, model="m")
        with pytest.raises(SettingsInvalid, match=r"does not answer in OpenAI's format; correct evaluate\.judge\.url"):
            judge(definition, answered("a"))
