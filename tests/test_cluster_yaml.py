"""Ray's cluster launcher accepts cluster.yaml, and its header is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from loramill.cli.main import app
from loramill.settings import Settings
from loramill.sizing.devices import accelerator_bytes

PATH = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


@pytest.mark.parametrize("keys", [(), ("auth",), ("docker",), ("available_node_types", "training-gpu")])
def test_ray_refuses_a_typo(config: dict[str, Any], keys: tuple[str, ...]) -> None:
    section = config
    for key in keys:
        section = section.setdefault(key, {})
    section["max_wrokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config(config))


def test_ray_refuses_an_unknown_head_type(config: dict[str, Any]) -> None:
    config["head_node_type"] = "haed"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(config))


def test_head_without_gpu_and_workers_that_scale_from_zero(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    nodes = prepared["available_node_types"]
    families = {name: node["node_config"]["InstanceType"][0] for name, node in nodes.items()}
    assert families.pop(prepared["head_node_type"]) not in "gp"
    assert len(families) >= 2
    assert set(families.values()) <= set("gp")  # AWS's families with NVIDIA GPUs begin with g or p
    for name in families:
        assert nodes[name]["min_workers"] == 0
        assert 0 < nodes[name]["max_workers"] <= prepared["max_workers"]


def test_engines_and_jobs_are_placed_on_nodes_that_fit_them(config: dict[str, Any]) -> None:
    header = PATH.read_text().split("\ncluster_name:")[0]
    placed = dict(re.findall(r"LORAMILL_(SERVE|JOBS)__ACCELERATOR_TYPE=(\S+)", header))
    assert {"LORAMILL_SERVE__DEVICE=cuda", "LORAMILL_JOBS__USE_GPU=true"} <= set(header.split())
    # AWS's families by the GPU that Ray detects in them.
    families = {"g6e": "L40S", "g6": "L4"}
    nodes = config["available_node_types"]
    serving, training = nodes["serving-gpu"], nodes["training-gpu"]
    for node, part in ((serving, "SERVE"), (training, "JOBS")):
        assert families[node["node_config"]["InstanceType"].partition(".")[0]] == placed[part]
        assert accelerator_bytes(placed[part]) is not None, "jobs can be sized for it"
    assert "InstanceMarketOptions" not in serving["node_config"]
    sessions = re.search(r"LORAMILL_JOBS__SESSIONS=(\d+)", header)
    assert sessions and int(sessions[1]) <= training["max_workers"]
    assert 60 * config["idle_timeout_minutes"] >= 5 * Settings().jobs.idle_seconds


def test_the_image_has_the_version_of_ray_that_is_tested(config: dict[str, Any]) -> None:
    constraints = (PATH.parent / "constraints.txt").read_text()
    version = re.search(r"^ray==(\S+)$", constraints, re.MULTILINE)
    assert version
    for image in ("head_image", "worker_image"):
        assert config["docker"][image].startswith(f"rayproject/ray:{version[1]}-py311")


def test_the_header_names_existing_settings_files_and_commands() -> None:
    header = PATH.read_text().split("\ncluster_name:")[0]
    variables = set(re.findall(r"LORAMILL_(\w+)=", header))
    assert variables >= {"DATABASE_URL", "ARTIFACTS_URL", "URL", "API_KEY"}
    for variable in variables:
        first, *rest = variable.lower().split("__")
        fields = Settings.model_fields
        assert first in fields
        if rest:
            assert rest[0] in type(fields[first].default).model_fields
    for file in re.findall(r"examples/\S+\.jsonl", header):
        assert (PATH.parent / file).is_file()
    commands = set(re.findall(r"loramill ([a-z]+)(?: [a-z]+/|\")", header))
    assert commands == {"join", "submit"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
