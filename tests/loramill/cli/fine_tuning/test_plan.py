"""`loramill plan`: its output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from typer.testing import CliRunner

from loramill.cli import app


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments: str) -> click.testing.Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_table_and_the_choice() -> None:
    done = run("--base", "8B", "--gpu", "24GB", "--method", "qlora", "--length", "2048")
    assert done.exit_code == 0, done.output
    items = [line.split()[0] for line in done.stdout.splitlines()]
    assert items[1:6] == ["framework", "base", "adapter", "optimizer", "gradients"]
    assert "total" in items
    assert "Fits: about" in done.stdout
    assert "of 25.3 GB" in done.stdout


def test_sizes_in_the_json_add_up() -> None:
    done = run("--base", "8B", "--gpu", "h100", "--rank", "64", "--targets", "q_proj, v_proj", "--json")
    found = json.loads(done.stdout)
    assert found["fits"] is True
    assert sum(item["bytes"] for item in found["items"]) == found["bytes"] <= found["budget"]
    assert found["sharers"] == found["budget"] // found["bytes"]


def test_a_plan_of_several_tenants() -> None:
    arguments = ("--base", "8B", "--gpu", "24GB", "--method", "qlora", "--length", "512")
    done = run(*arguments, "--tenants", "8")
    assert done.exit_code == 0, done.output
    items = [line.split()[0] for line in done.stdout.splitlines()]
    assert items[1:6] == ["framework", "base", "adapters", "optimizer", "gradients"]
    assert "8 such jobs in one session take about" in done.stdout and "One more takes" in done.stdout
    found = json.loads(run(*arguments, "--tenants", "8", "--json").stdout)
    assert sum(item["bytes"] for item in found["items"]) == found["bytes"] <= found["budget"]
    assert found["session"]["tenants"] == 8 <= found["session"]["most"]
    assert (
        found["bytes"] + found["session"]["next_bytes"]
        == json.loads(run(*arguments, "--tenants", "9", "--json").stdout)["bytes"]
    )
    refused = json.loads(run(*arguments, "--tenants", "1000", "--json").stdout)
    assert refused["fits"] is False and refused["nearest"][0].startswith("tenants = ")
    assert json.loads(run(*arguments, "--json").stdout)["session"] is None
    assert run(*arguments, "--tenants", "0").exit_code == 1


def test_a_refusal_names_what_would_fit() -> None:
    arguments = ("--base", "65B", "--gpu", "48GB", "--quantization", "none", "--rank", "64", "--length", "512")
    done = run(*arguments)
    assert done.exit_code == 1
    assert "nf4" in done.stderr
    refused = json.loads(run(*arguments, "--json").stdout)
    assert refused["fits"] is False
    assert any("nf4" in text for text in refused["nearest"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("job.toml", 'base = "8B"\ngpu = "24GB"\nquantization = "nf4"\nrank = 8\nlength = 512\nlayers = "0-7"\n'),
        ("job.json", '{"base": "8B", "gpu": "24GB", "quantization": "nf4", "rank": 8, "length": 512, "layers": "0-7"}'),
    ],
)
def test_a_file_equals_options_and_options_override_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    options = ("--base", "8B", "--gpu", "24GB", "--quantization", "nf4", "--length", "512", "--layers", "0-7", "--json")
    assert json.loads(run(name, "--json").stdout) == json.loads(run(*options, "--rank", "8").stdout)
    assert json.loads(run(name, "--rank", "4", "--json").stdout) == json.loads(run(*options, "--rank", "4").stdout)


def test_without_a_device_the_jobs_own_options_are_reported(tmp_path: Path) -> None:
    found = json.loads(run("--base", "8B", "--micro-tokens", "128", "--length", "64", "--json").stdout)
    assert (found["fits"], found["budget"], found["micro_tokens"]) == (None, None, 128)
    (tmp_path / "loramill.toml").write_text(f"[jobs]\nuse_gpu = true\nper_gpu = 2\ndevice_bytes = {80 * 2**30}\n")
    found = json.loads(run("--base", "8B", "--length", "64", "--json").stdout)
    assert (found["fits"], found["budget"]) == (True, 40 * 2**30)


def test_without_a_device_the_table_names_the_one_that_it_is_for() -> None:
    shown = run("--base", "8B", "--quantization", "nf4").stdout
    assert "a CPU keeps the rounded values and the file's" in shown
    assert "These are the sizes on a CPU. Give --gpu or --cpu" in shown


def test_host_memory_used_by_deepspeed_is_reported() -> None:
    done = run("--base", "8B", "--gpu", "80GB", "--method", "full")
    assert "Additional host memory" in done.stdout
    assert "offload = " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--base", "nothing"), "no base 'nothing'"),
        (("--base", "8B", "--gpu", "huge"), "'huge' is not a size"),
        (("--base", "8B", "--gpu", "24GB", "--cpu", "8GB"), "exclude each other"),
        (("--base", "8B", "--method", "magic"), "'method'"),
        (("--base", "8B", "--rank", "0"), "rank"),
        (("--base", "8B", "--targets", "w_pack"), "no linears named w_pack"),
        (("no.toml",), "no.toml"),
    ],
)
def test_invalid_options_have_a_one_line_error(arguments: tuple[str, ...], fragment: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert fragment in done.stderr
    assert "Traceback" not in done.output


def test_an_unknown_field_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('base = "8B"\nrnk = 8\n')
    done = run("job.toml")
    assert done.exit_code == 1
    assert "rnk" in done.stderr


def test_an_unreachable_hub_has_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    command = [sys.executable, "-m", "loramill.cli", "plan", "--base", "no-such-owner/no-such-model"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert len(ran.stderr.splitlines()) == 1 and "no model hub could be reached" in ran.stderr
