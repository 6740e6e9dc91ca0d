"""Merging against the unmerged adapter and against PEFT, and what it costs on each kind of base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from loramill.cli import app
from loramill.data.encoding import EncodedExample
from loramill.errors import AdapterInvalid, Conflict, InvalidRequest
from loramill.jobs.train.export.merge import REPORT_FILE, MergeOptions, MergeReport, merge, merge_into, with_adapter
from loramill.jobs.train.methods.seeds import seeded
from loramill.kernels import Batch
from loramill.kernels.peft_folder import WEIGHTS_FILE, BaseModules, read_adapter
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.registry import Registry, datasets, jobs, tenants
from loramill.registry.database.migrate import migrate
from loramill.serve.model import Chunk, load_decoder
from loramill.settings import Settings
from loramill.types import VersionRecord

from ...conftest import base_of
from ..tiny_training import random_examples, spec_of

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved(base: Base, to: Path, config: LoraConfig, size: float = 0.02) -> Path:
    """An adapter whose every matrix does something, as PEFT saves it."""
    with seeded(CPU, "adapter"):
        adapted = get_peft_model(load_for_training(base, torch.bfloat16).float(), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.data += size * torch.randn_like(parameter)
            if "magnitude" in name:
                parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(to)
    return to


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM"} | more)


KINDS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"q_proj": 7}, alpha_pattern={"down_proj": 3}),
    "dora": lora(use_dora=True),
    "adalora": AdaLoraConfig(init_r=6, target_r=3, lora_alpha=8, target_modules=LINEARS, total_step=10),
    "embeddings": lora(target_modules=[*LINEARS, "embed_tokens"]),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "both": lora(target_modules=["embed_tokens", "lm_head"]),
}


@torch.no_grad()
def logits(model: Any, examples: list[EncodedExample]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([example.tokens])).logits[0].float() for example in examples])


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_the_merged_model_equals_the_adapter(tiny_base_folder: Path, tmp_path: Path, kind: str) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    adapter = saved(base, tmp_path / "adapter", KINDS[kind], size=0.2)
    report = merge(
        base, adapter, random_examples(12), tmp_path / "merged", name="acme/a", options=MergeOptions(dtype="fp32")
    )
    assert report.divergence.kl < 1e-6 and report.divergence.agreement == 1.0
    plain = PeftModel.from_pretrained(load_for_training(base, torch.bfloat16).float(), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(plain, random_examples(5))
    assert not torch.allclose(expected, logits(load_for_training(base, torch.float32), random_examples(5)), atol=1e-2)
    torch.testing.assert_close(logits(merged, random_examples(5)), expected, rtol=1e-3, atol=1e-3)
    # An embedding and a head that were one are two, once an adapter changes only one of them.
    assert merged.config.tie_word_embeddings == (kind not in ("embeddings", "head", "both"))


def test_the_folder_is_a_base_with_a_report(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    adapter = saved(base, tmp_path / "adapter", lora())
    report = merge(base, adapter, random_examples(12), tmp_path / "merged", name="acme/a@12345678")
    assert MergeReport.model_validate_json((tmp_path / "merged" / REPORT_FILE).read_bytes()) == report
    assert (report.adapter, report.base, report.into, report.dtype) == ("acme/a@12345678", "tiny", "original", "bf16")
    assert report.divergence.tokens == sum(len(each.tokens) - each.prompt_length for each in random_examples(12))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    new = find_base(str(tmp_path / "merged"), tmp_path / "cache")
    assert new.fingerprint != base.fingerprint
    exact = merge_into(load_for_training(base, torch.bfloat16), adapter)
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name)), name


@torch.no_grad()
def test_the_divergence_is_the_mean_of_kl(tiny_base_folder: Path, tmp_path: Path) -> None:
    """By its definition, an example at a time, of the files that were written."""
    base = base_of(tiny_base_folder, tmp_path, "nf4")
    adapter = saved(base, tmp_path / "adapter", lora(), size=0.1)
    examples = random_examples(12)
    report = merge(
        base, adapter, examples, tmp_path / "merged", name="a", options=MergeOptions(into="original", max_kl=100.0)
    )
    plain = PeftModel.from_pretrained(load_for_training(base, torch.bfloat16).float(), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float()
    kls, same = [], []
    for example in examples:
        positions = slice(example.prompt_length - 1, len(example.tokens) - 1)
        p, q = (logits(model, [example])[positions].double().log_softmax(-1) for model in (plain, merged))
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert report.divergence.kl > 1e-3
    assert report.divergence.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)
    assert report.divergence.max_token_kl == pytest.approx(torch.cat(kls).max().item(), rel=1e-3)
    assert report.divergence.agreement == pytest.approx(torch.cat(same).double().mean().item())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_an_adapter_is_merged_into_the_values_it_was_trained_on(
    tiny_base_folder: Path, tmp_path: Path, quantization: Any
) -> None:
    base = base_of(tiny_base_folder, tmp_path, quantization)
    adapter = saved(base, tmp_path / "adapter", lora())
    by_default = merge(base, adapter, random_examples(12), tmp_path / "by-default", name="a")
    original = merge(
        base,
        adapter,
        random_examples(12),
        tmp_path / "original",
        name="a",
        options=MergeOptions(into="original", force=True),
    )
    assert (by_default.into, original.into) == ("dequantized", "original")
    assert by_default.divergence.kl < original.divergence.kl / 3
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    exact = merge_into(load_for_training(base_of(tiny_base_folder, tmp_path), torch.bfloat16), adapter)
    assert torch.equal(found.model.layers[0].mlp.up_proj.weight, exact.model.layers[0].mlp.up_proj.weight)


def test_a_large_divergence_is_refused_unless_forced(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = base_of(tiny_base_folder, tmp_path, "nf4")
    adapter = saved(base, tmp_path / "adapter", lora(), size=0.1)
    to = tmp_path / "merged"
    with pytest.raises(Conflict, match=r"nats per token.*--into dequantized.*--force"):
        merge(base, adapter, random_examples(12), to, name="a", options=MergeOptions(into="original", max_kl=1e-4))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "cache"]  # not even a part of it
    report = merge(
        base, adapter, random_examples(12), to, name="a", options=MergeOptions(into="original", max_kl=1e-4, force=True)
    )
    assert report.divergence.kl > report.max_kl == 1e-4
    assert json.loads((to / REPORT_FILE).read_text())["divergence"]["kl"] == report.divergence.kl


def test_impossible_merges_are_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    base, to = base_of(tiny_base_folder, tmp_path), tmp_path / "merged"
    adapter = saved(base, tmp_path / "adapter", lora())
    with pytest.raises(InvalidRequest, match="is not quantized"):
        merge(base, adapter, random_examples(3), to, name="a", options=MergeOptions(into="dequantized"))
    with pytest.raises(AdapterInvalid, match=r"adapter_config.json"):
        merge(base, tmp_path / "cache", random_examples(3), to, name="a")
    with pytest.raises(InvalidRequest, match="no completion"):
        merge(base, adapter, [], to, name="a")
    with pytest.raises(InvalidRequest, match="already exists"):
        merge(base, adapter, random_examples(3), adapter, name="a")
    assert not to.exists()


def respelled(adapter: Path, spell: Callable[[str], str | None]) -> Path:
    """The adapter with its tensors under other names; without those that have none."""
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({new: each for name, each in tensors.items() if (new := spell(name))}, adapter / WEIGHTS_FILE)
    return adapter


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace("base_model.model.model.", "base_model.model.language_model.model."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
    ids=["tower", "no prefix", "adapter's name"],
)
def test_tensor_names_that_peft_warns_about_are_merged(tiny_base_folder: Path, tmp_path: Path, spell: Any) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    plain = saved(base, tmp_path / "plain", lora(), size=0.2)
    merge(base, plain, random_examples(3), tmp_path / "expected", name="a")
    merge(base, respelled(plain, spell), random_examples(3), tmp_path / "merged", name="a")
    expected, found = (load_file(tmp_path / each / "model.safetensors") for each in ("expected", "merged"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found[Q_PROJ], load_file(tiny_base_folder / "model.safetensors")[Q_PROJ])


@pytest.mark.parametrize(
    ("spell", "missing"),
    [
        (lambda name: name if "layers.0." in name else None, r"layers.1.self_attn.q_proj.lora_A.weight"),
        (lambda name: name if "0.mlp.up_proj.lora_B" not in name else None, r"layers.0.mlp.up_proj.lora_B.weight"),
    ],
)
def test_an_incomplete_adapter_is_not_merged(tiny_base_folder: Path, tmp_path: Path, spell: Any, missing: str) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    adapter = respelled(saved(base, tmp_path / "adapter", lora()), spell)
    with pytest.raises(AdapterInvalid, match=f"lacks '[^']*{missing}'"):
        merge(base, adapter, random_examples(3), tmp_path / "merged", name="a", options=MergeOptions(force=True))
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_changes_nothing_is_an_error(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    adapter = tmp_path / "adapter"
    get_peft_model(load_for_training(base, torch.bfloat16), lora()).save_pretrained(adapter)
    with pytest.raises(AdapterInvalid, match="changes no weight"):
        merge(base, adapter, random_examples(3), tmp_path / "merged", name="a", options=MergeOptions(force=True))
    assert not (tmp_path / "merged").exists()


def test_the_divergence_is_measured_from_the_engines_predictions(tiny_base_folder: Path, tmp_path: Path) -> None:
    """Not from a model that PEFT made, which may be the bare base: a large divergence must show."""
    base = base_of(tiny_base_folder, tmp_path)
    adapter = saved(base, tmp_path / "adapter", lora(lora_alpha=64), size=0.3)
    examples = random_examples(12)
    model, engine = load_for_training(base, torch.float32), load_decoder(tiny_base_folder, dtype=torch.float32)
    deltas = read_adapter(adapter, BaseModules.of_sites(engine.sites, engine.target_weight))
    slab = engine.new_slab(1, 1 << 20)
    packed = slab.pack(deltas)
    slot = slab.allocate(packed.bytes)
    slab.load(slot, packed)
    for example in examples:
        count = len(example.tokens)
        chunk = Chunk(example.tokens, 0, list(range(8)), logits_to_keep=count)
        served = engine.forward([chunk], engine.new_cache(8, 64), slab, Batch.of([(slot, count)]))
        with with_adapter(model, deltas):
            torch.testing.assert_close(logits(model, [example]), served, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits(model, [example]), served, atol=0.1)


def test_weights_are_as_readable_as_the_other_files(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    merge(base, saved(base, tmp_path / "adapter", lora()), random_examples(3), tmp_path / "merged", name="a")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "merged").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == modes[REPORT_FILE]


def test_the_command_prints_only_its_own_output(tiny_base_folder: Path, tmp_path: Path, home: Path) -> None:
    """In a process of its own, since libraries log once per process."""
    adapter, rows = saved(base_of(tiny_base_folder, tmp_path), tmp_path / "adapter", lora()), tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    arguments = ["adapters", "merge", str(adapter), "--to", str(tmp_path / "merged"), "--valid", str(rows)]
    ran = subprocess.run(
        [sys.executable, "-m", "loramill.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def loramill(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def home(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings of a machine with this base, and its folder."""
    for name in [*os.environ]:
        if name.startswith("LORAMILL_"):
            monkeypatch.delenv(name)
    for name, value in {"HOME": tmp_path / "home", "CACHE": tmp_path / "cache", "BASE": tiny_base_folder}.items():
        monkeypatch.setenv(f"LORAMILL_{name}", str(value))
    return tmp_path / "home"


def published(home: Path, base: Base, adapter: Path, rows: str) -> str:
    """A version in the registry, of a job that was validated on these rows."""
    (home / "artifacts").mkdir(parents=True)
    settings = Settings.load()
    migrate(settings.database)
    registry = Registry.open(settings.database, settings.artifacts)
    version = registry.artifacts.put({file.name: file for file in adapter.iterdir() if file.suffix != ".md"})
    data = registry.artifacts.put({"data.jsonl": rows.encode()})
    with registry.writing() as session:
        tenants.create(session, "acme")
        train = datasets.create(session, "acme", "train.jsonl", "0" * 64, 1, 1).id
        valid = datasets.create(session, "acme", "valid.jsonl", data, 1, 1).id
        job = jobs.submit(session, spec_of(base=base.fingerprint, train=train, valid=valid), {}).id
        leased = jobs.lease(session, "worker", now=time.time(), seconds=60, max_attempts=1)
        record = VersionRecord(
            id=version, adapter="acme/support", job=job, base=base.fingerprint, bytes=1, created_at=time.time()
        )
        assert leased is not None
        jobs.publish(session, job, leased.attempt, record)
    registry.close()
    return version


ROWS = "".join(json.dumps({"prompt": f"number {row}: ", "completion": f"is {row}"}) + "\n" for row in range(5))


def test_the_command_compares_a_version_on_its_jobs_data(tiny_base_folder: Path, tmp_path: Path, home: Path) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    version = published(home, base, saved(base, tmp_path / "adapter", lora()), ROWS)
    ran = loramill("adapters", "merge", "acme/support", "--to", str(tmp_path / "merged"), "--json")
    assert ran.exit_code == 0, ran.output
    report = MergeReport.model_validate_json(ran.stdout)
    assert (report.adapter, report.divergence.examples) == (f"acme/support@{version}", 5)
    assert report == MergeReport.model_validate_json((tmp_path / "merged" / REPORT_FILE).read_bytes())
    result = loramill(
        "adapters", "merge", f"acme/support@{version[:8]}", "--to", str(tmp_path / "text"), "--dtype", "fp32"
    )
    assert "nats per token" in result.stdout and "original values" in result.stdout
    again = loramill("adapters", "merge", "acme/support", "--to", str(tmp_path / "merged"))
    assert again.exit_code == 1 and "already exists" in again.stderr


def test_the_command_merges_a_folder_and_names_what_is_missing(
    tiny_base_folder: Path, tmp_path: Path, home: Path
) -> None:
    base = base_of(tiny_base_folder, tmp_path)
    adapter, to, rows = saved(base, tmp_path / "adapter", lora()), tmp_path / "merged", tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    command = ("adapters", "merge", str(adapter), "--to", str(to))
    for arguments, code, message in (
        (command, 1, "--valid FILE"),
        (("adapters", "merge", "tiny", "--to", str(to)), 1, "is the base itself"),
        ((*command, "--valid", str(rows), "--into", "dequantized"), 1, "is not quantized"),
        ((*command, "--valid", str(rows), "--max-kl", "0"), 1, "--force"),
        ((*command, "--valid", str(rows), "--max-kl", "-1"), 2, ""),
    ):
        result = loramill(*arguments)
        assert result.exit_code == code and message in result.stderr and not to.exists(), result.output
    assert loramill(*command, "--valid", str(rows), "--max-kl", "0", "--force").exit_code == 0
    assert (to / "model.safetensors").is_file()
