"""`loramill adapters export` and `import`: PEFT and transformers load what was exported."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from loramill.registry import jobs
from loramill.types import VersionRecord

from ....llama import tiny_llama
from ...conftest import RunningGateway, examples
from ..running import loramill, use_gateway


@pytest.fixture(autouse=True)
def environment(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gateway(monkeypatch, gateway)


def model() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)


def published(gateway: RunningGateway, adapter: str, folder: Path, full_model: Path | None = None) -> str:
    """A version with a folder's files, published by a job; with full weights, by a full fine-tuning job."""
    version, *results = (
        gateway.registry.artifacts.put({file.name: file for file in each.iterdir() if file.suffix != ".md"})
        for each in (folder, full_model)
        if each is not None
    )
    with gateway.client() as client:
        job = client.jobs.submit(adapter, examples()).id
    attempt = gateway.begin(job)
    with gateway.registry.writing() as session:
        base = jobs.get(session, job).spec.base
        record = VersionRecord(id=version, adapter=adapter, job=job, base=base, bytes=1, created_at=time.time())
        jobs.publish(session, job, attempt, record, result=results[0] if results else None)
    return version


def test_exports_are_loaded_by_peft_and_transformers(gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    adapted = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    full_model = model()
    full_model.lm_head.weight.data += 1
    full_model.save_pretrained(tmp_path / "full")
    name = f"{tenant}/a"
    version = published(gateway, name, tmp_path / "adapter", tmp_path / "full")

    ran = loramill("adapters", "export", name, "--to", str(tmp_path / "exported"))
    assert (ran.exit_code, ran.stdout) == (0, "") and f"{name}@{version[:12]}" in ran.stderr
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"README.md", "tokenizer.json", "tokenizer_config.json"} <= {
        each.name for each in (tmp_path / "exported").iterdir()
    }
    tokens = torch.arange(10)[None]
    loaded = PeftModel.from_pretrained(model(), tmp_path / "exported")
    assert torch.equal(loaded(tokens).logits, adapted.eval()(tokens).logits)

    ran = loramill("adapters", "export", f"{name}@champion", "--full", "--to", str(tmp_path / "exported-full"))
    assert ran.exit_code == 0 and "loramill up --base" in ran.stderr
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported-full")
    assert torch.equal(loaded(tokens).logits, full_model.eval()(tokens).logits)


def test_a_failed_export_has_a_one_line_error(gateway: RunningGateway, tenant: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "tenant").write_text(tenant)
    published(gateway, f"{tenant}/a", tmp_path / "adapter")
    to = tmp_path / "exported"
    for arguments, message in (
        ((f"{tenant}/none",), "There is no adapter"),
        ((f"{tenant}/a@previous",), "has no previous"),
        ((f"{tenant}/a", "--full"), "loramill adapters merge"),
        (("smollm2-135m",), "is not an adapter"),
    ):
        ran = loramill("adapters", "export", *arguments, "--to", str(to))
        assert (ran.exit_code, ran.stdout) == (1, "") and message in ran.stderr and not to.exists()
    assert loramill("adapters", "export", f"{tenant}/a").exit_code == 2


def test_a_folder_is_imported_and_the_served_version_is_shown(
    gateway: RunningGateway, tenant: str, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [3]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name, q_proj = f"{tenant}/orders", "base_model.model.model.layers.3.self_attn.q_proj.lora_"
    for seed, options, message in (
        (1.0, (), f"{name} answers with it"),
        (2.0, (), f"{name} still answers with"),
        (3.0, ("--promote",), f"{name} answers with it"),
    ):
        tensors = {f"{q_proj}A.weight": torch.full((2, 576), seed), f"{q_proj}B.weight": torch.ones(576, 2)}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        ran = loramill("adapters", "import", name, str(tmp_path), *options)
        assert ran.exit_code == 0 and message in ran.stderr.replace("\n", " "), ran.stderr
    save_file({f"{q_proj}A.weight": torch.ones(2, 576)}, tmp_path / "adapter_model.safetensors")
    ran = loramill("adapters", "import", name, str(tmp_path))
    assert ran.exit_code == 1 and f"{q_proj}B.weight" in ran.stderr.replace("\n", "")
