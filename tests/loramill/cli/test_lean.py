"""A plain `pip install loramill`: the client and the commands that call a gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

#: Packages that only extras install.
FORBIDDEN = (
    "alembic",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "fastapi",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numpy",
    "openai",
    "peft",
    "plotext",
    "pyarrow",
    "ray",
    "safetensors",
    "sqlalchemy",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
)
RUN = f"""
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Forbid())
from loramill.cli import main
sys.argv = ["loramill", *sys.argv[1:]]
main()
"""
JOB = {
    "id": "ftjob-0123456789abcdef01234567",
    "created_at": 1.0,
    "model": "base",
    "status": "queued",
    "training_file": "file-1",
    "loramill": {"adapter": "acme/bot", "steps": 3, "spec": {}},
}
FILE = {"id": "file-1", "filename": "train.jsonl", "bytes": 9, "created_at": 1.0, "loramill": {"examples": 10}}
LISTS = {
    "/v1/models": [{"id": "base"}],
    "/v1/fine_tuning/jobs": [JOB],
    "/v1/files": [FILE],
    "/v1/adapters": [{"name": "acme/bot", "tenant": "acme", "created_at": 1.0}],
    "/v1/tenants": [],
    "/v1/usage": [],
}
POSTS = {"/v1/files": FILE, "/v1/fine_tuning/jobs": JOB}
PIECES = b"".join(
    b"data: %s\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}).encode()
    for word in ("Good ", "day")
)


class Gateway(BaseHTTPRequestHandler):
    """A gateway with one job, one file and one adapter, and the same answer to every chat."""

    def do_GET(self) -> None:
        rows = LISTS.get(self.path.partition("?")[0])
        self._send(json.dumps({"data": rows, "has_more": False}).encode(), 404 if rows is None else 200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(PIECES if self.path == "/v1/chat/completions" else json.dumps(POSTS[self.path]).encode())

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps the requests out of the test's output."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of the gateway."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def loramill(*arguments: str, url: str = "http://127.0.0.1:9", home: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command where only the client's packages can be imported."""
    environment = {**os.environ, "LORAMILL_URL": url, "LORAMILL_API_KEY": "lm-x", "LORAMILL_HOME": str(home)}
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["", "submit", "jobs", "plan", "generate", "compare", "up"])
def test_help_needs_no_extra(command: str, tmp_path: Path) -> None:
    ran = loramill(*command.split(), "--help", home=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "") and "Usage:" in ran.stdout


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("jobs list", "acme/bot"),
        ("files list", "train.jsonl"),
        ("adapters list", "acme/bot"),
        ("tenant list", ""),
        ("usage", ""),
        ("submit acme/bot --train TRAIN --epochs 1", JOB["id"]),
        ("chat acme/bot -m Hello", "Good day"),
    ],
)
def test_commands_that_call_a_gateway_need_no_extra(command: str, output: str, url: str, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text('{"prompt": "a", "completion": "b"}\n' * 10)
    ran = loramill(*command.replace("TRAIN", str(train)).split(), url=url, home=tmp_path)
    assert ran.returncode == 0 and output in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("up", "local"),
        ("nightly run", "local"),
        ("generate smollm2-135m -p Hello", "local"),
        ("submit acme/bot --train TABLE", "data"),
    ],
)
def test_a_missing_extra_is_named(command: str, extra: str, url: str, tmp_path: Path) -> None:
    table = tmp_path / "train.parquet"
    table.write_bytes(b"PAR1")
    ran = loramill(*command.replace("TABLE", str(table)).split(), url=url, home=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"pip install 'loramill[{extra}]'." in ran.stderr.replace("\n", " ") and "Traceback" not in ran.stderr
