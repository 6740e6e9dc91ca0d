"""`loramill.Client` with the real gateway, and with other servers at its address."""

from __future__ import annotations

import inspect
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loramill import Client, errors
from loramill.client.adapters import AdaptersResource
from loramill.client.files import FilesResource
from loramill.client.http import ERROR_BY_CODE, error_from_response, is_local_url
from loramill.client.jobs import JobsResource
from loramill.client.tenants import KeysResource, TenantsResource

from ..conftest import RunningGateway, examples

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """An HTTP server that isn't loramill's; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            answer(self)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(status: int, body: object) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("content-length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    return answer


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# With the real gateway


def test_an_admin_makes_tenants_and_keys(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as admin:
        assert tenant in [each.name for each in admin.tenants.list()]
        key = admin.keys.create(tenant)
        assert key.key.startswith("lm-") and key.key not in repr(key)
        assert [each.id for each in admin.keys.list(tenant)] == [key.id]
        with gateway.client(key.key) as own:
            assert own.models() == ["smollm2-135m"]
            with pytest.raises(errors.Forbidden):
                own.tenants.list()
            admin.keys.revoke(key.id)
            with pytest.raises(errors.Unauthenticated):
                own.models()
        assert admin.keys.list(tenant)[0].revoked_at is not None
        with pytest.raises(errors.Conflict):
            admin.tenants.create(tenant)


def test_fair_share_settings_change_one_at_a_time(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        assert client.tenants.set_share(tenant, weight=2, max_queued=1).weight == 2
        assert client.tenants.set_share(tenant, max_running=3).max_queued == 1
        client.jobs.submit(f"{tenant}/a", examples())
        with pytest.raises(errors.QuotaExceeded):
            client.jobs.submit(f"{tenant}/a", examples())
        assert client.tenants.set_share(tenant, max_queued="unlimited").max_queued is None
        client.jobs.submit(f"{tenant}/a", examples())


def test_an_adapter_is_promoted_and_rolled_back(gateway: RunningGateway, tenant: str) -> None:
    name = f"{tenant}/support"
    with gateway.client() as client:
        first = gateway.publish(client.jobs.submit(name, examples()).id)
        second = gateway.publish(client.jobs.submit(name, examples(word="new"), start_from="champion").id)
        assert client.adapters.get(name).challenger == second
        promoted = client.adapters.promote(name, second[:12])
        assert (promoted.champion, promoted.previous) == (second, first)
        assert client.adapters.rollback(name).champion == first
        with pytest.raises(errors.InvalidRequest, match="0123456789ab"):
            client.adapters.promote(name, "0123456789ab")
        client.adapters.add_data(name, examples(), valid=examples(2, "held"))


def test_refusals_are_typed(gateway: RunningGateway, tenant: str) -> None:
    with gateway.client() as client:
        with pytest.raises(errors.NotFound):
            client.jobs.get("ftjob-none")
        with pytest.raises(errors.NotFound):
            client.jobs.get("../../readyz")
        with pytest.raises(errors.NotFound, match="nobody"):
            client.jobs.submit("nobody/a", examples())
        with pytest.raises(errors.InvalidRequest, match="acme/support"):
            client.jobs.submit("noslash", examples())
        with pytest.raises(errors.InvalidRequest, match="can't be read"):
            client.jobs.submit(f"{tenant}/a", "/nowhere/train.jsonl")
        with pytest.raises(errors.ModelNotFound):
            client.chat(f"{tenant}/nothing", "Hello")
        with pytest.raises(errors.ModelNotFound):
            list(client.stream(f"{tenant}/nothing", "Hello"))
    with Client(gateway.url, "lm-wrong") as stranger:
        with pytest.raises(errors.Unauthenticated):
            stranger.models()
        with pytest.raises(errors.Unauthenticated):
            stranger.chat("smollm2-135m", "Hello")
        assert stranger.is_ready()


def test_a_client_acts_for_its_organization(gateway: RunningGateway, tenant: str) -> None:
    with Client(gateway.url, gateway.admin_key, organization=tenant) as client:
        client.files.upload(examples())
        job = client.jobs.submit(f"{tenant}/a", examples())
        assert [each.id for each in client.jobs.list()] == [job.id]
        assert client.openai().fine_tuning.jobs.retrieve(job.id).organization_id == tenant


# Keys and settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path))
    for name in ("LORAMILL_URL", "LORAMILL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def echo_key(request: BaseHTTPRequestHandler) -> None:
    reply(200, {"data": [{"id": request.headers.get("authorization") or "none"}]})(request)


def test_the_key_comes_from_the_settings_then_from_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(echo_key) as url:
        monkeypatch.setenv("LORAMILL_URL", f"{url}/v1/")
        assert Client().models() == ["none"]
        (home / "admin.key").write_text("lm-admin\n")
        assert Client().models() == ["Bearer lm-admin"]
        monkeypatch.setenv("LORAMILL_API_KEY", "lm-environment")
        assert Client().models() == ["Bearer lm-environment"]
        assert Client(api_key="lm-argument").models() == ["Bearer lm-argument"]


def test_the_admin_key_never_leaves_this_machine(home: Path) -> None:
    (home / "admin.key").write_text("lm-admin\n")
    with pytest.raises(errors.Unauthenticated):
        Client("http://gateway.example").openai()
    assert Client("http://127.0.0.1:9").openai().api_key == "lm-admin"


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://localhost:8400", True),
        ("http://127.0.0.2", True),
        ("http://[::1]:8400", True),
        ("http://localhost.example", False),
        ("http://10.0.0.1", False),
        ("http://[broken", False),
        ("", False),
    ],
)
def test_local_urls_are_recognized(url: str, local: bool) -> None:
    assert is_local_url(url) is local


def test_a_missing_or_invalid_key_is_reported(gateway: RunningGateway, home: Path) -> None:
    with pytest.raises(errors.Unauthenticated, match="LORAMILL_API_KEY"):
        Client(gateway.url).models()
    with pytest.raises(errors.Unauthenticated, match="LORAMILL_API_KEY"):
        Client(gateway.url).chat("smollm2-135m", "Hello")
    with pytest.raises(errors.SettingsInvalid, match="LORAMILL_API_KEY"):
        Client(gateway.url, "lm-ключ")


# Without a gateway at the address


def test_a_closed_port_means_not_running() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with Client(url, "lm-x") as client:
        for request in (client.models, lambda: client.chat("smollm2-135m", "Hello")):
            with pytest.raises(errors.NotRunning) as error:
                request()
            assert error.value.message == (
                f"Nothing answers at {url}: start it with `loramill up`, or set LORAMILL_URL."
            )
        assert not client.is_ready()


@pytest.mark.parametrize(
    ("answer", "expected", "message"),
    [
        (reply(200, b"<html>hello</html>"), errors.NotRunning, "isn't loramill"),
        (reply(200, [1]), errors.NotRunning, "isn't loramill"),
        (reply(200, {"data": 1}), errors.NotRunning, "isn't loramill"),
        (reply(404, b"not here"), errors.NotRunning, "HTTP 404"),
        (reply(302, b""), errors.NotRunning, "isn't loramill"),
        (reply(502, b"<html>Bad Gateway</html>"), errors.Unavailable, "HTTP 502"),
        (reply(500, {"error": {"message": "Oh.", "code": "internal_error"}}), errors.LoramillError, "^Oh.$"),
        (reply(429, {"error": {"message": "Full.", "code": "newer_code"}}), errors.Overloaded, "^Full.$"),
        (reply(413, {"error": {"message": "Large.", "code": None}}), errors.InvalidRequest, "^Large.$"),
        (lambda request: request.connection.close(), errors.Unavailable, "broke"),
    ],
)
def test_unexpected_responses_are_typed_errors(
    answer: Answer, expected: type[errors.LoramillError], message: str
) -> None:
    with (
        answering(answer) as url,
        Client(url, "lm-x") as client,
        pytest.raises(errors.LoramillError, match=message) as it,
    ):
        client.models()
    assert type(it.value) is expected


def test_an_unexpected_object_means_another_server() -> None:
    answer = reply(200, {"id": "x"})
    with answering(answer) as url, Client(url, "lm-x") as client, pytest.raises(errors.NotRunning, match="Job"):
        client.jobs.get("x")


def test_a_gateway_that_hangs_is_unavailable() -> None:
    hang = threading.Event()
    with answering(lambda _: bool(hang.wait(10)) and None) as url:
        with Client(url, "lm-x", timeout=0.1) as client, pytest.raises(errors.Unavailable, match="too long"):
            client.models()
        hang.set()


@pytest.mark.parametrize("url", ["127.0.0.1:8400", "ftp://host", "http://host:port"])
def test_an_invalid_address_is_a_settings_error(url: str) -> None:
    with pytest.raises(errors.SettingsInvalid, match="LORAMILL_URL"):
        Client(url, "lm-x").models()


def test_an_error_in_mid_stream_is_typed() -> None:
    piece = {"choices": [{"index": 0, "delta": {"content": "so far"}, "finish_reason": None}]}
    broken = {"error": {"message": "The engine stopped.", "code": "unavailable", "type": "server_error"}}
    body = b"".join(b"data: %s\n\n" % json.dumps(part).encode() for part in (piece, broken))
    with answering(reply(200, body)) as url, Client(url, "lm-x") as client:
        pieces = client.stream("m", "Hello")
        assert next(pieces) == "so far"
        with pytest.raises(errors.Unavailable, match="The engine stopped"):
            next(pieces)


def test_a_stream_that_breaks_is_unavailable() -> None:
    def cut(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-length", "1000")
        request.end_headers()
        request.wfile.write(b'data: {"choices": [{"index": 0, "delta": {"content": "so"}}]}\n\n')

    with answering(cut) as url, Client(url, "lm-x") as client:
        pieces = client.stream("m", "Hello")
        assert next(pieces) == "so"
        with pytest.raises(errors.Unavailable, match="broke"):
            next(pieces)


def test_wait_continues_through_a_short_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    job = {
        "id": "ftjob-1",
        "created_at": 1,
        "model": "b",
        "status": "succeeded",
        "training_file": "file-1",
        "fine_tuned_model": "a/b@1",
        "loramill": {"adapter": "a/b", "steps": 1, "spec": {}, "newer": 1},
    }
    unavailable = reply(503, {"error": {"message": "Not yet.", "code": "unavailable"}})
    answers = [unavailable, reply(200, job), unavailable]

    def answer(request: BaseHTTPRequestHandler) -> None:
        answers.pop(0)(request)

    with answering(answer) as url, Client(url, "lm-x") as client:
        assert client.jobs.wait("ftjob-1").model == "a/b@1"
        monkeypatch.setattr("loramill.client.jobs._OUTAGE_SECONDS", 0.0)
        with pytest.raises(errors.Unavailable):
            client.jobs.wait("ftjob-1")


def test_every_error_code_is_raised_as_its_class() -> None:
    assert len(ERROR_BY_CODE) == len(re.findall(r" [45]\d\d ", errors.__doc__))
    for code, cls in ERROR_BY_CODE.items():
        error = error_from_response(cls.status, {"error": {"message": "m", "param": "p", "code": code}}, "url")
        assert type(error) is cls
        assert (error.message, error.param) == ("m", "p")


def test_every_method_has_a_docstring() -> None:
    for cls in (Client, AdaptersResource, FilesResource, JobsResource, KeysResource, TenantsResource):
        public = {name: method for name, method in inspect.getmembers(cls) if not name.startswith("_")}
        assert [name for name, method in public.items() if callable(method) and not method.__doc__] == []
