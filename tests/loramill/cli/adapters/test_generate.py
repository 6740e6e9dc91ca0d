"""`loramill generate`: once on the real base, otherwise on a tiny random model with the real tokenizer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

from loramill.cli import app
from loramill.cli.adapters.completions import append_line
from loramill.errors import AdapterInvalid, DiskFull
from loramill.local.model import check_gains
from loramill.models.catalog import Base, find_base
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, tenants
from loramill.settings import Settings
from loramill.types import VersionRecord

from ....databases import create_sqlite_database
from ....llama import tiny_llama, write_base


def random_model() -> LlamaForCausalLM:
    return tiny_llama(
        torch.bfloat16,
        vocab_size=49152,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "tiny", random_model(), tokenizer=base.folder)


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "peft"
    model = random_model()
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    return folder


@pytest.fixture
def workdir(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; only the tiny base is set."""
    for name in [*os.environ]:
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAMILL_BASE", str(tiny))
    monkeypatch.setenv("LORAMILL_CACHE", str(tiny.parent / "cache"))
    monkeypatch.setenv("LORAMILL_SERVE__KV_TOKENS", "1024")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    arguments = (*arguments, "--max-tokens", "6") if "--max-tokens" not in arguments else arguments
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin, catch_exceptions=False)


def ok(*arguments: str | Path, stdin: str | None = None) -> str:
    ran = run(*arguments, stdin=stdin)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def failed(*arguments: str | Path, stdin: str | None = None) -> str:
    ran = run(*arguments, stdin=stdin)
    assert (ran.exit_code, ran.stdout) == (1, "")
    return ran.stderr


def rows(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_the_real_base_answers(workdir: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_BASE", base.name)
    monkeypatch.delenv("LORAMILL_CACHE")
    output = ok(base.name, "-p", "What is the capital of France?", "-p", "Say hello.", "--max-tokens", "12")
    first, second = output.splitlines()
    assert first == "The capital of France is Paris."
    assert second


def test_prompts_from_options_and_from_a_pipe(workdir: Path) -> None:
    first, second = ok("tiny", "-p", "Why?"), ok("tiny", "-p", "How?")
    assert ok("tiny", "-p", "Why?", "-p", "How?") == first + second != first * 2
    assert ok("tiny", stdin="Why?\n") == first
    assert ok("tiny", "-p", "Why?", "--chat") == first != ok("tiny", "-p", "Why?", "--raw")
    assert ok("tiny", "-p", "Why?", "--stop", first[2:4]) == first[: first.index(first[2:4])] + "\n"
    warm = ("tiny", "-p", "Why?", "--temperature", "1", "--top-p", "0.9", "--seed", "3")
    assert ok(*warm) == ok(*warm) != first


def test_a_file_of_prompts_is_answered_line_by_line(workdir: Path) -> None:
    lines = [
        {"prompt": "Once", "max_tokens": 3},
        {"messages": [{"role": "user", "content": "Why?"}], "id": "why"},
        {"prompt": "Twice", "completion": " upon a time"},
    ]
    (workdir / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ran = run("tiny", "--file", "prompts.jsonl")
    assert ran.exit_code == 0 and "3/3" in ran.stderr and "tokens/s" in ran.stderr
    answers = rows(ran.stdout)
    assert [row["id"] for row in answers] == ["1", "why", "3"]
    assert [row["usage"]["completion_tokens"] for row in answers] == [3, 6, 6]
    assert answers[1]["text"] + "\n" == ok("tiny", "-p", "Why?")
    assert answers[2]["text"] + "\n" == ok("tiny", "-p", "Twice", "--raw")
    assert set(answers[0]) == {"id", "text", "finish_reason", "usage"} and answers[0]["finish_reason"] == "length"
    (workdir / "prompts.txt").write_text("Why?\n\nHow?\n")
    assert ok("tiny", "--file", "prompts.txt", "--out", "out.jsonl") == ""
    answers = rows((workdir / "out.jsonl").read_text(encoding="utf-8"))
    assert [row["id"] for row in answers] == ["1", "3"]
    assert answers[0]["text"] + "\n" == ok("tiny", "-p", "Why?")


def test_existing_files_are_not_overwritten(workdir: Path) -> None:
    (workdir / "prompts.txt").write_text("Why?\n")
    (workdir / "out.jsonl").write_text("precious\n" * 100)
    for out in ("out.jsonl", "prompts.txt", "none/out.jsonl", "."):
        assert out in failed("tiny", "--file", "prompts.txt", "--out", out)
    assert "another" in failed("tiny", "--file", "prompts.txt", "--out", "prompts.txt", "--force")
    assert (workdir / "prompts.txt").read_text() == "Why?\n"
    assert (workdir / "out.jsonl").read_text() == "precious\n" * 100
    ok("tiny", "-p", "Why?", "--out", "out.jsonl", "--force")
    assert [row["id"] for row in rows((workdir / "out.jsonl").read_text())] == ["1"]


def publish(folder: Path, name: str, base: str) -> tuple[Registry, str]:
    settings = Settings.load()
    create_sqlite_database(settings.database)
    registry = Registry.open(settings.database, settings.artifacts)
    artifact = registry.artifacts.put({file.name: file for file in folder.iterdir()})
    with registry.writing() as session:
        adapter = AdapterName.parse(name)
        tenants.create(session, adapter.tenant)
        adapters.get_or_create(session, adapter)
        adapters.add_version(
            session, VersionRecord(id=artifact, adapter=name, job=None, base=base, bytes=1, created_at=1.0)
        )
    return registry, artifact


def test_a_model_is_the_base_a_folder_or_from_the_registry(workdir: Path, tiny: Path, peft: Path) -> None:
    base = find_base(str(tiny), workdir / "cache")
    registry, version = publish(peft, "acme/support", base.fingerprint)
    by_base, by_folder = ok("tiny", "-p", "Why?"), ok(peft, "-p", "Why?")
    assert by_base != by_folder
    for model in ("acme/support", "acme/support@champion", f"acme/support@{version[:12]}"):
        assert ok(model, "-p", "Why?") == by_folder
    assert "no challenger" in failed("acme/support@challenger", "-p", "Why?")
    assert "does not exist" in failed("acme/nothing", "-p", "Why?")
    assert "the base here is 'tiny'" in failed("smollm2-135m", "-p", "Why?")
    assert f"its folder {peft.name} contains one: give that folder" in failed(peft.parent, "-p", "Why?")
    assert "It is not a folder" in failed(workdir / "nothing", "-p", "Why?")
    weights = registry.artifacts.fetch(version) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert "adapter_model.safetensors" in failed("acme/support", "-p", "Why?")
    registry.close()


def test_a_version_for_another_base_is_refused(workdir: Path, peft: Path) -> None:
    publish(peft, "acme/support", "0" * 64)[0].close()
    assert "another base" in failed("acme/support", "-p", "Why?")


def test_a_missing_database_is_reported(workdir: Path) -> None:
    assert "loramill up" in failed("acme/support", "-p", "Why?")


def test_a_failed_prompt_is_reported_and_the_others_are_answered(workdir: Path) -> None:
    (workdir / "prompts.txt").write_text(f"Why?\n{'word ' * 200}\nHow?\n")
    ran = run("tiny", "--file", "prompts.txt")
    assert ran.exit_code == 1
    assert "1 of 3 prompts failed; the first of them is prompt 2: The prompt has" in ran.stderr
    first, second, third = rows(ran.stdout)
    assert first["text"] and third["text"]
    assert (second["id"], second["error"]["code"]) == ("2", "context_length_exceeded")
    ran = run("tiny", "-p", "Why?", "-p", "word " * 200)
    assert ran.exit_code == 1 and ran.stdout == first["text"] + "\n"


def test_an_unreadable_adapter_fails_every_prompt(workdir: Path, peft: Path) -> None:
    broken = shutil.copytree(peft, workdir / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "The prompt failed: adapter_model.safetensors" in failed(broken, "-p", "a")
    assert "2 of 2 prompts failed; the first of them is prompt 1: adapter_model.safetensors" in failed(
        broken, "-p", "a", "-p", "b"
    )


def test_codes_of_a_base_in_nf4_are_kept_in_the_cache(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_QUANTIZATION", "nf4")
    monkeypatch.setenv("LORAMILL_CACHE", str(workdir / "cache"))
    first = ok("tiny", "-p", "Why?")
    assert len([*(workdir / "cache/nf4").glob("*/*.safetensors")]) == 7, "one per linear of the layer"
    assert ok("tiny", "-p", "Why?") == first


def test_the_gains_of_a_dora_are_those_of_its_base(
    workdir: Path, peft: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = shutil.copytree(peft, workdir / "exported")
    found = find_base(str(tiny), workdir / "cache")
    (exported / "dora_gains.safetensors").touch()
    with pytest.raises(AdapterInvalid, match="or remove the file"):
        check_gains(exported, found)
    (exported / "loramill.json").write_text(json.dumps({"base": found.fingerprint}))
    check_gains(exported, found)
    monkeypatch.setenv("LORAMILL_QUANTIZATION", "int8")
    assert "of the base 'tiny' with quantization 'int8'" in failed(exported, "-p", "Why?")


def test_a_bad_file_is_refused_before_anything_is_loaded(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramill.serve.offline.OfflineEngine", None)
    (workdir / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n{\n')
    message = failed("tiny", "--file", "bad.jsonl")
    assert "bad.jsonl has 2 problems" in message and "line 2: prompt" in message and "line 3: " in message


@pytest.mark.parametrize("arguments", [(), ("-p", "a", "--file", "prompts.txt"), ("--file", "none.txt")])
def test_prompts_come_from_exactly_one_source(workdir: Path, arguments: tuple[str, ...]) -> None:
    (workdir / "prompts.txt").write_text("Why?\n")
    assert run("tiny", *arguments, stdin="").exit_code == 2


def test_a_killed_run_leaves_complete_lines(workdir: Path) -> None:
    (workdir / "prompts.txt").write_text("Why?\n" * 20_000)
    arguments = ["tiny", "--file", "prompts.txt", "--out", "out.jsonl", "--max-tokens", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loramill.cli", "generate", *arguments], stderr=subprocess.DEVNULL
    )
    out = workdir / "out.jsonl"
    while not (out.exists() and out.stat().st_size > 2000):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    answers = rows(out.read_text(encoding="utf-8"))
    assert 10 < len(answers) < 20_000
    assert [row["id"] for row in answers] == [str(number) for number in range(1, len(answers) + 1)]


def test_a_full_disk_leaves_complete_lines(tmp_path: Path) -> None:
    class SmallDisk(FileIO):
        def write(self, line: Any) -> int:
            if self.tell() + len(line) <= 12:
                return super().write(line)
            if self.tell() == 12:
                raise OSError(errno.ENOSPC, "full")
            return super().write(bytes(line)[: 12 - self.tell()])

    with SmallDisk(tmp_path / "out", "wb") as file:
        append_line(file, b"whole 1\n")
        with pytest.raises(DiskFull, match="the answers in it are complete lines"):
            append_line(file, b"whole 2\n")
    assert (tmp_path / "out").read_bytes() == b"whole 1\n"


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from loramill.cli import app\n"
        "assert '--max-tokens' in CliRunner().invoke(app, ['generate', '--help']).output\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'sqlalchemy', 'ray'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "COLUMNS": "100"})
