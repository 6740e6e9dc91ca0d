"""serve.yaml equals the output of `serve build`, and its header is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

PATH = Path(__file__).parents[1] / "serve.yaml"


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def built(committed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of the header's command, with the variables that the file itself sets."""
    variables = committed["applications"][0]["runtime_env"]["env_vars"]
    (words,) = re.findall(r"^# +(serve build .*)$", PATH.read_text(), re.MULTILINE)
    output = tmp_path_factory.mktemp("built") / "serve.yaml"
    subprocess.run(
        [str(Path(sys.executable).with_name("serve")), *words.split()[1:], "-o", str(output)],
        env={name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")} | variables,
        cwd=output.parent,
        check=True,
    )
    return yaml.safe_load(output.read_text())  # type: ignore[no-any-return]


def test_the_deployments_are_those_of_the_code(committed: dict[str, Any], built: dict[str, Any]) -> None:
    mine, theirs = committed["applications"][0], built["applications"][0]
    assert mine["deployments"] == theirs["deployments"]
    assert mine["import_path"] == theirs["import_path"]
    assert mine["name"] == "loramill" and committed["proxy_location"] == "Disabled"


def test_serve_accepts_every_key(committed: dict[str, Any]) -> None:
    read = ServeDeploySchema.model_validate(committed).model_dump(by_alias=True, exclude_unset=True)
    assert unknown(committed, read) == []


def test_an_unknown_key_is_found(committed: dict[str, Any]) -> None:
    app = committed["applications"][0]
    engine, *others = app["deployments"]
    wrong = {**committed, "applications": [{**app, "deployments": [{**engine, "num_replcas": 2}, *others]}]}
    read = ServeDeploySchema.model_validate(wrong).model_dump(by_alias=True, exclude_unset=True)
    assert unknown(wrong, read) == ["applications.0.deployments.0.num_replcas"]


def unknown(written: Any, read: Any, where: str = "") -> list[str]:
    """Keys that parsing has dropped; Serve itself ignores them silently."""
    if isinstance(written, list):
        written, read = dict(enumerate(written)), dict(enumerate(read))
    if not isinstance(written, dict) or where.endswith(("env_vars.", "policy_kwargs.")):
        return []
    missing = [f"{where}{key}" for key in written if key not in read]
    return missing + [
        found for key in written if key in read for found in unknown(written[key], read[key], f"{where}{key}.")
    ]
