"""The access log: every request by its id, and nothing of prompts or keys."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramill.serve.api.middleware import access_log

from ....waiting import eventually


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process writes its access log into."""
    propagate = access_log.log.propagate
    access_log.open_access_log(tmp_path)
    yield tmp_path
    for handler in list(access_log.log.handlers):
        if isinstance(handler, access_log.SharedLogFile):
            access_log.log.removeHandler(handler)
            handler.close()
    access_log.log.propagate = propagate
    access_log.log.setLevel(logging.NOTSET)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "access.log").read_text().splitlines()]


def test_every_request_is_found_by_the_id_of_its_answer(
    folder: Path, site: Any, http: httpx.Client, tenant: str
) -> None:
    answers = [
        http.post("/v1/completions", json={"model": "tiny", "prompt": "a secret prompt", "stream": True}),
        http.get("/v1/nothing", params={"secret": "query"}),
        http.post("/v1/completions", json={"model": "nothing", "prompt": "a secret prompt"}),
    ]
    with site.http() as keyless:
        answers += [keyless.get("/v1/models"), keyless.get("/v1/models/lm-abc_DEF-1/x%0Ay")]
    eventually(lambda: len(lines(folder)) >= len(answers))  # a line follows the last byte of its answer
    found = {line["request"]: line for line in lines(folder)}
    logged = [found[answer.headers["x-request-id"]] for answer in answers]
    assert [(line["tenant"], line["method"], line["path"], line["status"]) for line in logged] == [
        (tenant, "POST", "/v1/completions", 200),
        (tenant, "GET", "/v1/nothing", 404),
        (tenant, "POST", "/v1/completions", 404),
        (None, "GET", "/v1/models", 401),
        (None, "GET", "/v1/models/lm-…/x\ny", 401),
    ]
    assert all(line["ms"] >= 0 and line["time"].endswith("Z") for line in logged)
    text = (folder / "access.log").read_text()
    assert "secret" not in text and "abc_DEF" not in text and http.headers["authorization"][7:] not in text
    assert len(text.splitlines()) == len(found) == 5


def test_a_probe_is_logged_only_where_it_fails(folder: Path, http: httpx.Client) -> None:
    for path in ("/healthz", "/health", "/readyz"):
        assert http.get(path).status_code == 200
    access_log.log_request(request_id="r", tenant=None, method="GET", path="/readyz", status=503, seconds=0.1)
    assert [line["status"] for line in lines(folder)] == [503]


def test_a_full_file_is_moved_by_one_of_the_gateways_that_share_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "MAX_FILE_BYTES", 1000)
    access_log.open_access_log(folder)  # as a second gateway's
    first, second = (each for each in access_log.log.handlers if isinstance(each, access_log.SharedLogFile))
    for number in range(30):
        record = logging.LogRecord("loramill.access", logging.INFO, "", 0, f"{number:090}", None, None)
        (first if number % 2 else second).emit(record)
    numbers = [int(line) for name in ("access.log.1", "access.log") for line in (folder / name).read_text().split()]
    assert numbers == list(range(numbers[0], 30)) and len(numbers) >= 11
    assert (folder / "access.log").stat().st_size <= 1000 + 91


def test_a_log_that_cannot_be_written_fails_no_request(
    folder: Path, http: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: logging.Handler, __: logging.LogRecord) -> None:
        raise OSError(28, "No space left on device")

    [handler] = (each for each in access_log.log.handlers if isinstance(each, access_log.SharedLogFile))
    monkeypatch.setattr(handler, "format", lambda record: full(handler, record))
    assert [http.get("/v1/models").status_code for _ in range(3)] == [200] * 3
    messages = [record.getMessage() for record in caplog.records if record.name == "loramill.gateway"]
    assert len(messages) == 1 and "access.log can't be written" in messages[0] and "No space left" in messages[0]
