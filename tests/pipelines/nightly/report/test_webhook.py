"""Messages to a real HTTP server: retries, refusals, timeouts, and secrets that stay secret."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loramill.pipelines.nightly.report.webhook import PAUSES, send

SECRET = "T000-secret"


class Hook(ThreadingHTTPServer):
    """Answers with the statuses of a test, one after another, and keeps what it got; 0 answers nothing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.statuses: list[int] = []
        self.got: list[dict] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/services/{SECRET}"


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hook = self.server
        assert isinstance(hook, Hook) and self.headers["content-type"] == "application/json"
        hook.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        status = hook.statuses.pop(0)
        if status == 0:
            hook.release.wait(30)
            return
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("statuses", "arrives"),
    [
        ([200], True),
        ([500, 204], True),
        ([503, 429, 200], True),
        ([502, 502, 502], False),
        ([404], False),
        ([302], False),
    ],
)
def test_outages_are_retried_and_refusals_are_not(hook: Hook, statuses: list[int], arrives: bool) -> None:
    hook.statuses = list(statuses)
    pauses: list[float] = []
    delivery = send(hook.url, {"text": "hello"}, sleep=pauses.append)
    assert hook.statuses == [] and hook.got == [{"text": "hello"}] * len(statuses)
    assert pauses == list(PAUSES)[: len(statuses) - 1]
    assert (delivery.problem is None) == arrives
    if delivery.problem is not None:
        assert f"status {statuses[-1]}" in delivery.problem and "notify.webhook" in delivery.problem


def test_a_server_that_does_not_answer_is_given_up(hook: Hook) -> None:
    hook.statuses = [0, 0, 0]
    delivery = send(hook.url, {"text": "hello"}, sleep=lambda seconds: None, timeout=0.1)
    assert len(hook.got) == 3 and delivery.problem is not None and "ReadTimeout" in delivery.problem


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://[bad/", "ftp://127.0.0.1/", "http:///", "not a url"])
def test_an_unusable_address_is_a_problem_and_not_an_error(url: str) -> None:
    delivery = send(f"{url}{SECRET}", {"text": "hello"}, sleep=lambda seconds: None, timeout=1)
    assert delivery.problem is not None and SECRET not in delivery.problem


def test_the_address_which_is_a_secret_is_not_in_the_problem(hook: Hook) -> None:
    hook.statuses = [403]
    problem = send(hook.url, {}).problem
    assert problem is not None and SECRET not in problem and "127.0.0.1" in problem
