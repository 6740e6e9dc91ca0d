"""`loramill doctor`: the findings of each check, good and bad, and the whole command."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from rich.console import Console
from typer.testing import CliRunner

from loramill.cli import app
from loramill.errors import BaseUnusable
from loramill.local import doctor, packages, probes
from loramill.local import up as local_up
from loramill.local.findings import Finding, Status
from loramill.models import smollm2
from loramill.models.catalog import Base
from loramill.registry import Registry, datasets, jobs, tenants
from loramill.registry.database.migrate import migrate
from loramill.settings import Settings
from loramill.types import JobSpec

from ..conftest import RunningGateway

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAMILL_URL", "http://127.0.0.1:9")


def single_finding(check: Callable[[Settings], Iterable[Finding]], **options: object) -> Finding:
    (finding,) = check(Settings.load(**options))
    assert bool(finding.fix) == (finding.status is not Status.OK), "each problem has a fix, and only problems have one"
    return finding


def test_tested_versions_are_those_that_the_constraints_pin() -> None:
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in lines}
    wanted = [canonicalize_name(each.name) for each in packages.requirements("all")]
    assert {name: pins.get(name) for name in wanted} == packages.TESTED_VERSIONS


@pytest.mark.parametrize(
    ("version", "status", "message"),
    [
        (None, Status.ERROR, "not installed"),
        ("2.59.0", Status.ERROR, "needs"),
        ("3.0.0", Status.ERROR, "needs"),
        ("2.60.0", Status.OK, "2.60.0"),
        ("2.60.3", Status.OK, "2.60.3"),
        ("2.61.0", Status.WARN, "tested"),
        ("2.60.0+cpu", Status.OK, "cpu"),
    ],
)
def test_a_package_is_judged_by_its_version(version: str | None, status: Status, message: str) -> None:
    finding = packages.judge_package("ray", ">=2.60,<3", version, "2.60.0")
    assert (finding.what, finding.status) == ("ray", status)
    assert message in finding.found
    assert ("pip install" in finding.fix) == (status is not Status.OK)


def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_: Settings) -> Iterable[Finding]:
        raise ModuleNotFoundError("No module named 'sqlalchemy'", name="sqlalchemy")

    (finding,) = doctor._run_check(check, Settings.load())
    assert (finding.status, finding.fix) == (Status.ERROR, "pip install 'loramill[local]'")
    assert packages.judge_package("torch", ">=2", None, None).fix == "pip install 'loramill[local]'"
    monkeypatch.setattr(probes, "_RAY", "raise ModuleNotFoundError(\"No module named 'ray'\")")
    assert single_finding(probes.ray).fix == "pip install 'loramill[local]'"


def test_an_installation_of_the_client_names_the_extra_once(monkeypatch: pytest.MonkeyPatch) -> None:
    of_client = {each.name for each in packages.requirements("")}
    installed = packages.installed_version
    monkeypatch.setattr(packages, "installed_version", lambda name: installed(name) if name in of_client else None)
    found = doctor.examine()
    (problem,) = [each for each in found if each.status is not Status.OK]
    assert (problem.what, problem.fix) == ("extra local", "pip install 'loramill[local]'")
    assert {"python", "loramill", "httpx", "gateway"} <= {each.what for each in found}


def test_this_machine_has_what_loramill_needs() -> None:
    found = {finding.what: finding for finding in packages.packages(Settings.load())}
    assert {"loramill", "torch", "ray"} <= set(found)
    assert {finding.status for finding in found.values()} <= {Status.OK, Status.WARN}


def test_the_processor_is_reported() -> None:
    flags = frozenset({"avx2", "avx512f", "avx512_bf16"})
    assert probes.cpu("AVX512", flags, 2, 1).found == "AVX2, AVX512, AVX512-BF16; 2 cores, torch uses 1 thread"
    assert probes.cpu("DEFAULT", frozenset(), 2, 1).status is not Status.ERROR


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_TORCH", "raise ImportError('libtorch.so: no such file')")
    assert "libtorch.so" in single_finding(probes.hardware).found
    monkeypatch.setattr(probes, "_TORCH", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    finding = single_finding(probes.hardware)
    assert finding.status is Status.ERROR and "SIGILL" in finding.found
    monkeypatch.setattr(probes, "_TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr(probes, "_PROBE_SECONDS", 0.2)
    assert "does not start" in single_finding(probes.hardware).found


def test_the_kernels_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(probes, "_KERNELS", "import json, sys; print(json.dumps([sys.argv[1], 'some']))")
        backend, compiler = probes.kernels(Settings.load(serve={"device": "cuda"}))
    assert (backend.status, backend.found, compiler.status) == (Status.OK, "some, on cuda", Status.OK)
    monkeypatch.setenv("LORAMILL_KERNELS", "torch")
    backend, _ = probes.kernels(Settings.load(serve={"device": "cpu"}))
    assert backend.found == "torch, on cpu"
    monkeypatch.setenv("LORAMILL_KERNELS", "none")
    monkeypatch.setenv("PATH", "")
    backend, compiler = probes.kernels(Settings.load())
    assert (backend.status, compiler.status) == (Status.ERROR, Status.WARN)
    assert "LORAMILL_KERNELS=none" in backend.found


def test_the_base_is_reported_and_never_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    assert "converted at first use" in single_finding(doctor.base, cache=cache).found
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    missing = single_finding(doctor.base, cache=cache)
    assert missing.status is Status.ERROR and "pip install" in missing.fix
    assert "hub" in single_finding(doctor.base, cache=cache, base="Qwen/Qwen3-0.6B").found
    assert single_finding(doctor.base, cache=cache, base="nothing").status is Status.ERROR
    assert single_finding(doctor.base, cache=cache, base="./nothing").status is Status.ERROR
    assert not (cache / "bases" / f"{smollm2.NAME}-{smollm2.REVISION}").exists()


def test_a_usable_base_is_described(base: object) -> None:
    finding = single_finding(doctor.base)
    assert finding.status is Status.OK and "LlamaForCausalLM, 8192 tokens" in finding.found


@pytest.mark.parametrize(
    ("template", "status", "message"),
    [
        (None, Status.WARN, "serves completions only, not chat: it has no chat template"),
        ("{{ image() }}", Status.WARN, "refuses every conversation: 'image' is undefined"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", Status.WARN, "trains on prompts and completions"),
        (
            "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            Status.OK,
            "LlamaForCausalLM",
        ),
        ("{% for %}", Status.ERROR, "chat template has an error"),
        ("Hello", Status.ERROR, "drops the content of assistant and user messages"),
    ],
)
def test_limits_of_a_bases_chat_template_are_reported(
    hermes_base: Base, tmp_path: Path, template: str | None, status: Status, message: str
) -> None:
    folder = shutil.copytree(hermes_base.folder, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    found = list(doctor.base(Settings.load(base=str(folder), cache=tmp_path / "cache")))
    assert found[-1].status is status and message in f"{found[-1].found} {found[-1].fix}"
    assert len(found) == (2 if status is Status.WARN else 1)
    printed = io.StringIO()
    up = Settings.load(base=str(folder), cache=tmp_path / "cache", home=tmp_path / "home")
    if status is Status.ERROR:
        with pytest.raises(BaseUnusable, match=message):
            local_up.prepare_base(up, Console(file=printed, width=400))
    else:
        local_up.prepare_base(up, Console(file=printed, width=400))
        assert (message in printed.getvalue()) is (status is Status.WARN)


def test_folders_are_checked_but_not_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, cache = doctor.folders(Settings.load(home=tmp_path / "a/b", cache=tmp_path))
    assert (home.status, cache.status) == (Status.OK, Status.OK)
    assert "created at first use" in home.found and "made" not in cache.found
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    home, _ = doctor.folders(Settings.load(home=tmp_path / "file/home", cache=tmp_path))
    assert home.status is Status.ERROR and "LORAMILL_HOME" in home.fix
    monkeypatch.setattr("loramill.local.preparation.FREE_BYTES", 1 << 62)
    home, cache = doctor.folders(Settings.load(home=tmp_path, cache=tmp_path))
    assert (home.status, cache.status) == (Status.ERROR, Status.ERROR) and "LORAMILL_CACHE" in cache.fix


def test_the_database_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "loramill.db"
    assert "does not exist" in single_finding(doctor.database, home=tmp_path).found
    assert not path.exists()
    migrate(f"sqlite:///{path}")
    assert "newest migration" in single_finding(doctor.database, home=tmp_path).found
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM alembic_version")
    connection.close()
    assert "migrat" in single_finding(doctor.database, home=tmp_path).fix
    path.write_bytes(b"no database at all, but long enough to be looked at" * 99)
    broken = single_finding(doctor.database, home=tmp_path)
    assert broken.status is Status.ERROR and str(path) in broken.fix
    assert single_finding(doctor.database, database_url="mysql://host/name").status is Status.ERROR


def test_the_artifact_store_is_reported(tmp_path: Path) -> None:
    good = single_finding(doctor.stores, home=tmp_path)
    assert good.status is Status.OK and "artifacts" in good.found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    bad = single_finding(doctor.stores, artifacts_url=f"file://{tmp_path}/file/store")
    assert bad.status is Status.ERROR and "artifacts_url" in bad.fix


def test_jobs_and_adapters_of_other_bases_are_reported(tmp_path: Path, base: Base) -> None:
    options = {"home": tmp_path, "base": str(base.folder)}
    settings = Settings.load(**options)
    assert list(doctor.other_bases(settings)) == [], "there is no database yet, and none is created"
    assert not (tmp_path / "loramill.db").exists()
    migrate(settings.database)
    assert list(doctor.other_bases(settings)) == []
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        tenants.create(session, "acme")
        train = datasets.create(session, "acme", "a.jsonl", "d" * 64, 1, 1).id
        jobs.submit(session, JobSpec(base="f" * 64, adapter="acme/bot", train=train, steps=1, batch_size=1), {})
    registry.close()
    found = single_finding(doctor.other_bases, **options)
    assert found.status is Status.WARN and found.found.startswith("1 job for other bases than ")
    assert "LORAMILL_BASE" in found.fix and "loramill jobs list" in found.fix
    assert list(doctor.other_bases(Settings.load(home=tmp_path, base="nowhere/at-all"))) == []


def test_the_gateway_is_reported(gateway: RunningGateway) -> None:
    assert "up and ready" in single_finding(doctor.gateway, url=gateway.url).found
    assert "not running" in single_finding(doctor.gateway).found
    assert single_finding(doctor.gateway, url="nonsense").status is Status.WARN


def test_another_program_on_the_port_is_reported() -> None:
    script = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler)"
    script += "; print(s.server_port, flush=True); s.serve_forever()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        assert other.stdout is not None
        finding = single_finding(doctor.gateway, url=f"http://127.0.0.1:{int(other.stdout.readline())}")
        other.kill()
    assert finding.status is Status.ERROR and "another program" in finding.found


def test_a_port_without_http_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_GATEWAY_SECONDS", 0.2)
        assert single_finding(doctor.gateway, url=f"http://127.0.0.1:{listener.getsockname()[1]}").status is Status.WARN


def test_invalid_settings_are_a_finding_and_the_rest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_SURPRISE", "1")
    settings, (finding,) = doctor.read_settings()
    assert finding.status is Status.ERROR and "LORAMILL_SURPRISE" in finding.fix
    assert settings.home == Path("~/.loramill").expanduser()


def test_a_check_that_raises_is_a_finding_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Settings) -> Iterable[Finding]:
        yield Finding(what="half", status=Status.OK, found="done")
        raise ModuleNotFoundError("No module named 'sqlalchemy'")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.python))
    settings, half, error, python = doctor.examine()
    assert (settings.status, half.what, python.what) == (Status.OK, "half", "python")
    assert error.status is Status.ERROR and "sqlalchemy" in error.found and error.what == "broken"


def test_the_command_reports_every_check_and_exits_0_if_usable() -> None:
    command = [sys.executable, "-m", "loramill.cli", "doctor", "--json"]
    ran = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    names = {finding["what"] for finding in json.loads(ran.stdout)}
    assert {"settings", "python", "torch", "ray", "cpu", "gpu", "kernels", "C compiler", "base", "home"} <= names
    assert {"cache", "database", "gateway", "ray starts"} <= names


def test_the_command_exits_1_if_something_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.base))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setenv("LORAMILL_BASE", "nothing")
    ran = CliRunner().invoke(app, ["doctor"])
    assert ran.exit_code == 1
    assert "error" in ran.stdout and "There is no base 'nothing'" in ran.stdout


def test_packages_without_problems_are_one_line() -> None:
    found = [
        doctor.Finding(what="loramill", status=doctor.Status.OK, found="1"),
        doctor.Finding(what="torch", status=doctor.Status.OK, found="2"),
        doctor.Finding(what="huggingface_hub", status=doctor.Status.OK, found="2"),
        doctor.Finding(what="ray", status=doctor.Status.WARN, found="9", fix="pip install ray"),
        doctor.Finding(what="disk", status=doctor.Status.OK, found="much"),
    ]
    collapsed = packages.collapse_packages(found)
    assert [each.what for each in collapsed] == ["loramill", "packages", "ray", "disk"]
    assert collapsed[1].found.startswith("2 as required")
    assert packages.collapse_packages(found[3:]) == found[3:]
