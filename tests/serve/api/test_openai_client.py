"""An environment with the `openai` package and nothing else is all that a user of the gateway needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with `openai` alone."""
    home = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile", "openai"]
    made = subprocess.run(
        [*install, "-c", str(ROOT / "constraints.txt"), "--retries", "1", "--timeout", "10"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"no package index is within reach: {made.stderr.strip()[-300:]}")
    return python


def run(python: Path, site: Any, key: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"OPENAI_BASE_URL": f"{site.url}/v1", "OPENAI_API_KEY": key, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [python, "-I", *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_an_ordinary_users_script(python: Path, site: Any, tenant: str) -> None:
    version = site.publish(f"{tenant}/support", f"{tenant} support")
    with site.http(site.admin_key) as http:
        assert http.post(f"/v1/adapters/{tenant}/support/promote", json={"version": version}).status_code == 200
    script, model = str(ROOT / "examples" / "openai_client.py"), f"{tenant}/support"
    done = run(python, site, site.key(tenant), script, model)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert printed["models"] == str(["tiny", model])
    assert printed["chat"] == "Say hello to the world. 10 tokens"
    assert printed["stream"] == "Say hello to the world. (5 tokens)"
    assert printed["choice 1"] == "[-1.0, -1.0, -1.0, -1.0]"
    assert printed["events"] == "Say hello to the world."
    assert printed["completions"] == "['Once upon', 'There was']"
    assert printed["async"] == "['Tell me about rain.', 'Tell me about snow.', 'A fog', 'A storm']"
    assert printed["cancelled"] == "cancelled"
    assert printed["dpo"] == "dpo 0.2 cancelled"
    errors = re.findall(r"^error: (\d+ \w+) \S", done.stdout, re.MULTILINE)
    assert errors == ["404 model_not_found", "400 unsupported_parameter", "401 invalid_api_key"]


def test_the_environment_has_only_openai(python: Path, site: Any) -> None:
    for module in ("loramill", "torch", "fastapi"):
        missing = run(python, site, "", "-c", f"import {module}")
        assert missing.returncode != 0 and "ModuleNotFoundError" in missing.stderr
