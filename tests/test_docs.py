"""The documentation is true: its commands and its Python run, its settings and files exist, its links lead somewhere.

Blocks of commands run one after another against one gateway with an echo as the model and a worker that publishes a
ready-made adapter for each job. A block after `<!-- not run: why -->` is only checked for commands and options that
exist; `<!-- file: NAME -->` writes a block to a file in the page's folder, and `<!-- first: COMMAND; … -->` prepares a
page.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from safetensors.torch import save
from torch import ones
from typer.testing import CliRunner, Result

from loramill.cli import app
from loramill.client import Client
from loramill.registry import jobs
from loramill.settings import Settings
from loramill.types import VersionRecord

from .loramill.conftest import RunningGateway, examples, gateway

__all__ = ["gateway"]

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")]
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[a-z ]+)(?:: (?P<detail>[^\n]*?))? -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S
)
#: Why a block may not run: what it needs that a test cannot have, or what tests it elsewhere.
REASONS = ("needs the network", "needs a Ray cluster", "needs a GPU", "starts", "loads", "trains", "writes", "examines")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the comment right above it."""

    page: str
    language: str
    text: str
    mark: str
    detail: str

    @property
    def commands(self) -> list[str]:
        """The commands after a `$ `, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [re.split(r"\s+#\s", line[2:])[0].strip() for line in lines if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    name = page.relative_to(ROOT).as_posix()
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(name, *(each[key] or "" for key in ("language", "text", "mark", "detail"))) for each in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_PAGES = sorted({each.page for each in BLOCKS if each.language in {"console", "python"} and each.mark != "not run"})
COMMANDS = sorted({command for block in BLOCKS for command in block.commands if command.startswith("loramill ")})


def generator() -> ModuleType:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_have_commands_and_code() -> None:
    assert len(RUN_PAGES) >= 8
    assert len(COMMANDS) >= 40


def test_every_block_that_does_not_run_gives_a_known_reason() -> None:
    for block in BLOCKS:
        assert block.mark in {"", "not run", "file"}, block
        assert block.mark != "not run" or block.detail.startswith(REASONS), block


@cache
def help_of(*nouns: str) -> Result:
    """What `loramill NOUNS --help` prints."""
    return CliRunner().invoke(app, [*nouns, "--help"], env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_exists(command: str) -> None:
    words = shlex.split(command)[1:]
    nouns = list(itertools.takewhile(lambda word: re.fullmatch(r"[a-z]+", word), words))
    while nouns:
        if help_of(*nouns).exit_code == 0:
            break
        nouns.pop()  # the last word was an argument
    shown = help_of(*nouns)
    for option in (word for word in words if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(^|[\s,/]){re.escape(option)}($|[\s,/])", shown.output, re.M), f"{option} of {command}"


@pytest.mark.parametrize("page", generator().PAGES)
def test_a_reference_page_is_what_the_code_generates(page: str) -> None:
    module = generator()
    assert (module.FOLDER / page).read_text(encoding="utf-8") == module.PAGES[page](), "run `python docs/generate.py`"


def test_the_api_reference_lists_the_fields_of_every_body() -> None:
    module = generator()
    schema = module.openapi()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            section = module.endpoint_section(operation, method, path, schema)
            assert ("| body" in section) == ("requestBody" in operation), f"{method} {path}"


def test_every_setting_in_the_text_exists() -> None:
    known = {name for name, _ in generator().setting_fields(Settings)}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:serve|jobs)\.(?!yaml)[a-z_]+)(?: = [^`]*)?`", text):
            assert name in known, f"{name} in {page}"
        for variable in re.findall(r"LORAMILL_((?:SERVE|JOBS)__[A-Z_]+)", text):
            assert variable.lower().replace("__", ".") in known, f"{variable} in {page}"


@pytest.mark.parametrize("page", NAMES)
def test_every_file_and_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!https?:|mailto:)[^)]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target} in {page}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, target
    for name in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:md|yaml|py|csv|json|toml|service))`", text):
        roots = [path.parent, *(ROOT / folder for folder in ("", "loramill", "kernels", "jobs", "serve", "pipelines"))]
        assert name.startswith("~") or any((root / name).exists() for root in roots), f"{name} in {page}"


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.language in {"toml", "yaml", "python", "json"}])
def test_data_and_code_are_valid(block: Block) -> None:
    match block.language:
        case "toml":
            tomllib.loads(block.text)
        case "yaml":
            yaml.safe_load(block.text)
        case "json":
            [json.loads(line) for line in block.text.splitlines()]
        case "python":
            compile(block.text, block.page, "exec")


def test_the_settings_files_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [each for each in BLOCKS if each.language == "toml" and each.text.startswith("# loramill.toml")]
    assert found
    for block in found:
        (tmp_path / "loramill.toml").write_text(block.text)
        Settings.load()


def test_the_figures_are_those_of_the_results() -> None:
    with (ROOT / "benchmarks" / "results.csv").open() as file:
        results = {(row["case"], f"{row['value']} {row['unit']}") for row in csv.DictReader(file)}
    for page in ("README.md", "docs/benchmarks.md"):
        shown = re.findall(r"^\| `([^`]*: [^`]*)` \|.*\| ([^|]*) \|$", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert shown
        assert set(shown) <= results, set(shown) - results


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_ci_runs_on_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    supported = re.search(r"for version in ([\d. ]+); do", (ROOT / ".ci" / "resolve").read_text(encoding="utf-8"))
    assert supported
    assert job["strategy"]["matrix"]["python"] == supported[1].split()


# What the pages run against.


def peft_adapter() -> dict[str, bytes]:
    """A LoRA of rank 2 for the built-in base, as PEFT saves it."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format(layer, half): ones((2, 576) if half == "A" else (576, 2)) for layer in range(30) for half in "AB"
    }
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def publish_next(gateway: RunningGateway, number: int) -> bool:
    """Publishes a ready-made adapter for the next job; returns whether a job was queued."""
    with gateway.registry.writing() as session:
        job = jobs.lease(session, "worker", now=time.time(), seconds=600, max_attempts=5)
    if job is None:
        return False
    files = peft_adapter() | {"number.txt": str(number).encode()}
    artifact = gateway.registry.artifacts.put(files)
    with gateway.registry.writing() as session:
        spec = jobs.get(session, job.id).spec
        version = VersionRecord(
            id=artifact, adapter=spec.adapter, job=job.id, base=spec.base, bytes=9, created_at=time.time()
        )
        jobs.publish(session, job.id, job.attempt, version)
    return True


@dataclass
class Worker:
    """Publishes a version for each queued job in a thread, unless it is paused.

    Attributes:
        lock: held while a job is leased and published, so that no job is deleted or paused in between.
    """

    gateway: RunningGateway
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)
    paused: bool = False

    def run(self) -> None:
        for number in itertools.count():
            with self.lock:
                if not self.paused:
                    publish_next(self.gateway, number)
            if self.ended.wait(0.05):
                return


@pytest.fixture(scope="module")
def worker(gateway: RunningGateway) -> Iterator[Worker]:
    worker = Worker(gateway)
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield worker
    worker.ended.set()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that a page's commands run in, with the files that the pages name."""
    for name in ("train", "valid", "test", "more", "again", "monday", "bolt"):
        (tmp_path / f"{name}.jsonl").write_bytes(examples(word=name))
    pairs = ({"prompt": f"thing {number}", "chosen": " yes", "rejected": " no"} for number in range(12))
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    rows = "".join(f"thing {number},code {number}\n" for number in range(12))
    for name in ("acme", "questions"):
        (tmp_path / f"{name}.csv").write_text("question,answer\n" + rows)
    (tmp_path / "my-lora").mkdir()
    for name, content in peft_adapter().items():
        (tmp_path / "my-lora" / name).write_bytes(content)
    return tmp_path


def filled(text: str, admin: Client, url: str) -> str:
    """A page's text with this gateway's address, and ids in place of its examples."""
    if "ftjob-" in text:
        found = list(admin.jobs.list())
        text = re.sub("ftjob-(new|1)", lambda example: found[0 if example[1] == "new" else -1].id, text)
    if "3f2a9c01" in text:
        text = re.sub(r"3f2a9c01\w*", (admin.adapters.get("acme/support").champion or "")[:12], text)
    if "lm-…" in text:
        text = text.replace("lm-…", admin.keys.create("acme").key)
    return text.replace("http://127.0.0.1:8400", url)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_commands_of_a_page_run(
    page: str,
    gateway: RunningGateway,
    worker: Worker,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORAMILL_HOME", str(gateway.home))
    monkeypatch.setenv("LORAMILL_URL", gateway.url)
    monkeypatch.setenv("LORAMILL_API_KEY", gateway.admin_key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    prepared = re.findall(r"<!-- first: (.*) -->", (ROOT / page).read_text(encoding="utf-8"))
    with gateway.client() as admin:
        with worker.lock:
            for tenant in admin.tenants.list():
                admin.tenants.delete(tenant.name, cancel_jobs=True)
            worker.paused = False
        for command in "; ".join(prepared).split("; ") if prepared else ():
            run(command, folder, worker)
        for block in [each for each in BLOCKS if each.page == page]:
            if block.mark == "file":
                if not (folder / block.detail).exists():
                    (folder / block.detail).write_text(block.text)
            elif block.mark != "not run" and block.language == "console":
                for command in block.commands:
                    run(filled(command, admin, gateway.url), folder, worker)
            elif block.mark != "not run" and block.language == "python":
                exec(compile(filled(block.text, admin, gateway.url), page, "exec"), {})  # a page's own code


def run(command: str, folder: Path, worker: Worker) -> None:
    """Runs one command; `loramill` in this process. After a job of low priority, the worker is paused."""
    if "--priority -10" in command:
        with worker.lock:
            worker.paused = True
    if command.startswith("loramill "):
        ran = CliRunner().invoke(app, shlex.split(command)[1:], input="", catch_exceptions=False)
        assert ran.exit_code == 0, f"{command}\n{ran.output}"
    else:
        shell = subprocess.run(["bash", "-ec", command], cwd=folder, capture_output=True, text=True, check=False)
        assert shell.returncode == 0, f"{command}\n{shell.stdout}{shell.stderr}"
