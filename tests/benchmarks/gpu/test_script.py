"""`benchmarks/gpu.py` runs from a checkout that is not installed, and no stage is lost by what happens in another."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loramill_bench.gpu import command, criteria, stages
from loramill_bench.gpu.runner import run_stages
from loramill_bench.gpu.stage import Stage
from loramill_bench.results import Result

ROOT = Path(__file__).parents[3]
#: What loramill's extras install and a machine with a GPU may lack.
LACKING = (
    "ray", "sqlalchemy", "alembic", "llguidance", "fastapi", "fastapi_offline", "starlette", "uvicorn", "httptools",
    "msgpack", "prometheus_client", "python_multipart", "gguf", "datasets", "pyarrow", "openai", "deepspeed",
    "matplotlib", "plotext", "rich", "typer",
)  # fmt: skip
SCRIPT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({LACKING!r}))
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "benchmarks/gpu.py")!r}, run_name="__main__")
"""


def test_all_stages_run_from_a_checkout_that_is_not_installed_without_the_extras(tmp_path):
    # Without site, no package of the checkout is installed.
    command_line = [sys.executable, "-S", "-P", "-c", SCRIPT, "--dry", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command_line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    reports = json.loads((tmp_path / "results.json").read_text())
    assert [report["stage"] for report in reports] == [stage.name for stage in stages.STAGES]
    assert not [report["failure"] for report in reports if report["failure"]]
    cases = [result["case"] for report in reports for result in report["results"]]
    assert "gpu decode 4/4: temperature 1 over greedy" in cases
    assert "gpu train: difference by recomputation" in cases
    # A criterion of what is right that matches nothing would be met by nothing.
    unused = [
        each.cases
        for each in criteria.CRITERIA
        if each.when_dry and each.cases != "gpu checks *: worst error" and not any(map(each.matches, cases))
    ]
    assert not unused


def good(context):
    context.note("a remark")
    yield Result("gpu logits a", 0.01, "of the logits")
    yield Result("gpu decode 1/1: over the floor", 9.0, "x")


def missing(context):
    yield Result("gpu logits a", 0.04, "of the logits")


def nothing_measured(context):
    yield Result("gpu decode 1/1: greedy step", float("nan"), "ms")


def failing(context):
    yield Result("gpu logits a", 0.01, "of the logits")
    raise ValueError("the device said no")


def run(folder, *stages, dry=True, seconds=60.0, script=None):
    return run_stages(stages, folder, dry=dry, seconds=seconds, print_line=lambda line: None, script=script)


def test_a_stage_that_fails_keeps_its_results_and_the_next_one_runs(tmp_path):
    first, second = run(tmp_path, Stage("failing", 1, failing), Stage("good", 1, good))
    assert [result.met for result in first.results] == [True]
    assert first.missed == ["failing: ValueError: the device said no"]
    assert second.failure is None
    assert second.notes == ("a remark",)
    assert second.missed == []
    written = json.loads((tmp_path / "results.json").read_text())
    assert [report["stage"] for report in written] == ["failing", "good"]


def test_speeds_have_no_targets_in_a_dry_run_and_correctness_has(tmp_path):
    (dry,) = run(tmp_path, Stage("good", 1, good))
    assert [result.met for result in dry.results] == [True, None]
    (real,) = run(tmp_path, Stage("good", 1, good), dry=False)
    assert [result.met for result in real.results] == [True, False]
    assert real.missed == ["gpu decode 1/1: over the floor: 9 x (<= 1.35)"]
    (wrong,) = run(tmp_path, Stage("missing", 1, missing))
    assert wrong.missed == ["gpu logits a: 0.04 of the logits (<= 0.03)"]


def test_a_value_that_is_not_a_number_is_missed(tmp_path):
    (report,) = run(tmp_path, Stage("nothing measured", 1, nothing_measured))
    assert report.missed == ["gpu decode 1/1: greedy step: nan ms"]


def test_a_target_over_the_floor_allows_small_kernels_their_launch():
    judge = criteria.Criterion("a", 6.0, over_floor=2.0).judge
    assert judge(Result("a", 1.0, "us", floor=20.0)).target == 40.0
    assert judge(Result("a", 1.0, "us", floor=1.0)).target == 7.0


def test_a_stage_without_enough_time_is_left_out(tmp_path):
    (report,) = run(tmp_path, Stage("good", 100, good), seconds=10)
    assert report.failure == "left out: 10 s were left of 100 s"
    assert report.results == ()


def test_a_process_that_crashes_hangs_or_is_killed_ends_its_stage_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, subprocess, sys, time\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "name = options['--stage']\n"
        "result = {'case': 'gpu logits a', 'value': 0.01, 'unit': 'of the logits'}\n"
        "with open(os.path.join(options['--out'], name + '.jsonl'), 'a') as file:\n"
        "    file.write(json.dumps({'result': result}) + chr(10))\n"
        "print('printed by', name, flush=True)\n"
        "if name == 'hanging':\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
        "os._exit(3 if name == 'crashing' else 0)\n"
    )
    crashing, hanging, good_one = (Stage(name, 1, good) for name in ("crashing", "hanging", "good"))
    begun = time.monotonic()
    reports = run(tmp_path, crashing, hanging, good_one, dry=False, script=str(script))
    assert time.monotonic() - begun < 30
    assert [len(report.results) for report in reports] == [1, 1, 1]
    assert [report.failure and report.failure.partition(";")[0] for report in reports] == [
        "its process ended with status 3",
        "ended after 2 s",
        None,
    ]
    assert (tmp_path / "crashing.log").read_text() == "printed by crashing\n"
    # The processes that it has started end with it.
    child = int((tmp_path / "hanging.log").read_text().split()[-1])
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    # A process whose parent has ended may stay as a zombie.
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_stage_runs_in_a_process_by_its_name(tmp_path):
    script = str(ROOT / "benchmarks/gpu.py")
    (report,) = run(tmp_path, stages.STAGES[0], script=script)
    assert report.failure is None, (tmp_path / "machine.log").read_text()
    assert [result.case for result in report.results] == ["gpu machine: problems"]


@pytest.mark.parametrize(
    ("arguments", "status", "printed"),
    [
        (["--only", "engines"], 2, "There is no stage 'engines'; there are machine, checks, "),
        (["--only", "machine"], 2, "finds no CUDA device"),
        (["--only", "machine", "--dry"], 0, "All criteria are met."),
        (["--model"], 0, "H100: a decode step"),
    ],
)
def test_the_command_line(tmp_path, capsys, monkeypatch, arguments, status, printed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([*arguments, "--out", str(tmp_path)]) == status
    assert printed in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_a_stage_runs(tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        assert command.main(["--dry", "--only", "machine", "--out", str(folder)]) == 2
        assert f"--out {folder} can't be used for results" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf", "long"])
def test_a_time_that_is_not_above_zero_is_refused(tmp_path, capsys, seconds):
    with pytest.raises(SystemExit):
        command.main(["--dry", "--seconds", seconds, "--out", str(tmp_path)])
    assert f"--seconds: '{seconds}' is not a number of seconds above 0" in capsys.readouterr().err


def test_rows_are_written_as_the_csv_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    measured = [Stage("good", 1, good)]
    monkeypatch.setattr(command, "_chosen", lambda names: measured)
    monkeypatch.setattr(command, "run_stages", lambda stages, folder, **_: run(folder, *stages, dry=False))
    assert command.main(["--out", str(tmp_path), "--commit", "abc"]) == 1
    header, first, second = (tmp_path / "rows.csv").read_text().splitlines()
    assert header == (ROOT / "benchmarks/results.csv").read_text().partition("\n")[0]
    assert ",abc,NVIDIA H200,python " in first
    assert second.endswith(",gpu decode 1/1: over the floor,9,x,<= 1.35,")
