"""Adapters that were trained elsewhere become versions, in one normal form, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loramill.client import Client
from loramill.errors import InvalidRequest
from loramill.kernels.peft_folder import read_adapter
from loramill.models.catalog import base_modules
from loramill.registry import tenants
from loramill.types import Limits

from ...conftest import CONFIG as CONFIG_OF_BASE

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


def weights(prefix: str = "base_model.model.", seed: int = 1) -> dict[str, torch.Tensor]:
    """An adapter for the gateway's tiny base."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}model.layers.{layer}.self_attn.{module}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for layer in (0, 1)
        for module, width in (("q_proj", 32), ("v_proj", 16))
        for part, shape in (("A", (2, 32)), ("B", (width, 2)))
    }


def form(config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | bytes | None = None) -> Any:
    content = tensors if isinstance(tensors, bytes) else save(weights() if tensors is None else tensors)
    return {"config": ("c", json.dumps(CONFIG | (config or {}))), "weights": ("w", content)}


def test_an_imported_adapter_is_a_version_like_any_other(http: httpx.Client, site: Any, tenant: str) -> None:
    path = f"/v1/adapters/{tenant}/orders"
    first = http.post(f"{path}/import", files=form())
    assert first.status_code == 200, first.text
    version = first.json()["version"]
    assert (first.json()["champion"], first.json()["challenger"]) == (version, None)
    second = http.post(f"{path}/import", files=form(tensors=weights(seed=2))).json()
    assert (second["champion"], second["challenger"]) == (version, second["version"])
    third = http.post(f"{path}/import", files=form(tensors=weights(seed=3)), data={"promote": "true"}).json()
    assert (third["champion"], third["previous"]) == (third["version"], version)
    found = http.get(path).json()
    assert {each["job"] for each in found["versions"]} == {None}
    assert found["history"][-1]["reason"] == "imported"
    with site.http(site.admin_key) as admin:
        changes = admin.get("/v1/audit", params={"tenant": tenant}).json()["data"]
    assert [each["action"] for each in changes] == ["adapter.import"] * 3
    assert changes[-1]["details"]["version"] == version
    answer = http.post("/v1/completions", json={"model": f"{tenant}/orders", "prompt": "hi", "max_tokens": 2})
    assert answer.status_code == 200


def test_other_spellings_are_stored_in_one_normal_form(http: httpx.Client, site: Any, tenant: str) -> None:
    """The same content, whatever the trainer called its modules, is the same version, and computes the same."""
    path = f"/v1/adapters/{tenant}/orders/import"
    plain = http.post(path, files=form()).json()["version"]
    respelled = {name.replace(".weight", ".default.weight"): each for name, each in weights("").items()}
    regex = {"target_modules": r".*\.self_attn\.(q|v)_proj", "base_model_name_or_path": "unsloth/tiny-bnb-4bit"}
    again = http.post(path, files=form(regex, respelled)).json()["version"]
    folders = [site.registry.artifacts.fetch(version) for version in (plain, again)]
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]
    assert configs[0]["target_modules"] == ["q_proj", "v_proj"]
    assert load(files[0]).keys() == weights().keys()
    deltas = read_adapter(folders[1], base_modules(site.base))
    assert {delta.scale for delta in deltas.values()} == {4.0}
    q = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.equal(deltas["model.layers.1.self_attn.q_proj"].b, weights()[q])


def test_ranks_scales_and_layers_per_module_are_kept(http: httpx.Client, site: Any, tenant: str) -> None:
    own = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5.3},
        "exclude_modules": r".*\.0\.self_attn\.v_proj",
        "use_rslora": True,
    }
    tensors = {name: each for name, each in weights().items() if "0.self_attn.v_proj" not in name}
    q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    tensors |= {f"{q}A.weight": torch.ones(3, 32), f"{q}B.weight": torch.ones(32, 3)}
    answer = http.post(f"/v1/adapters/{tenant}/orders/import", files=form(own, tensors))
    folder = site.registry.artifacts.fetch(answer.json()["version"])
    scales = {name[13:]: delta.scale for name, delta in read_adapter(folder, base_modules(site.base)).items()}
    assert scales == pytest.approx(
        {"0.self_attn.q_proj": 5.3 / 2**0.5, "1.self_attn.q_proj": 8 / 3**0.5, "1.self_attn.v_proj": 8 / 2**0.5}
    )


def without_layer_1() -> dict[str, torch.Tensor]:
    return {name: each for name, each in weights().items() if "layers.0." in name}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (form(tensors=without_layer_1()), "layers.1.self_attn.q_proj.lora_A.weight"),
        (form({"peft_type": "IA3"}), "LORA and ADALORA"),
        (form({"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (form({"r": 4}), "must be [4, 32]"),
        (form(tensors={**weights(), "x": torch.ones(1)}), "'x'"),
        (form(tensors={name: each * float("nan") for name, each in weights().items()}), "NaN"),
        (form(tensors=b"\x80\x04\x95 a pickle"), "can't be read"),
        (form(tensors=b""), "can't be read"),
        ({"config": ("c", b"{"), "weights": ("w", save(weights()))}, "can't be read"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(http: httpx.Client, tenant: str, files: Any, message: str) -> None:
    answer = http.post(f"/v1/adapters/{tenant}/orders/import", files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", "weights"), answer.text
    assert message in error["message"] and "orders" in error["message"]
    assert http.get(f"/v1/adapters/{tenant}/orders").status_code == 404


def test_imports_have_bounds(http: httpx.Client, site: Any, tenant: str) -> None:
    path = f"/v1/adapters/{tenant}/orders/import"
    too_large = http.post(path, files=form(tensors=bytes(300_000)))
    assert too_large.status_code == 413
    assert http.post(path, files=form()).status_code == 200
    stored = http.get(path.removesuffix("/import")).json()["versions"][0]["bytes"]
    with site.registry.writing() as session:
        tenants.set_limits(session, tenant, Limits(stored_bytes=stored * 3 // 2))
    over = http.post(path, files=form(tensors=weights(seed=2)))
    assert over.json()["error"]["code"] == "quota_exceeded"
    assert http.post(path.replace(tenant, "another"), files=form()).status_code == 403


def test_the_client_imports_a_folder(site: Any, tenant: str, tmp_path: Path) -> None:
    with Client(site.url, api_key=site.key(tenant)) as client:
        with pytest.raises(InvalidRequest, match=r"no adapter_config.json"):
            client.adapters.import_folder(f"{tenant}/orders", tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(InvalidRequest, match=r"is a pickle.*weights_only=True"):
            client.adapters.import_folder(f"{tenant}/orders", tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(save(weights()))
        version, adapter = client.adapters.import_folder(f"{tenant}/orders", tmp_path, promote=True)
        assert adapter.champion == version


def test_an_export_is_loaded_by_peft_alone(site: Any, tenant: str, tmp_path: Path) -> None:
    """The export names the base's folder and has its tokenizer; the stored bytes are unchanged."""
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(**{key: CONFIG_OF_BASE[key] for key in CONFIG_OF_BASE if key[:5] != "archi"}))
    save_file(base.model.state_dict(prefix="model."), site.base.folder / "model.safetensors", {"format": "pt"})
    (site.base.folder / "tokenizer.json").write_text("{}")
    adapter, exported = tmp_path / "adapter", tmp_path / "exported"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG))
    (adapter / "adapter_model.safetensors").write_bytes(save(weights()))
    with Client(site.url, api_key=site.key(tenant)) as client:
        version, _ = client.adapters.import_folder(f"{tenant}/orders", adapter)
        assert client.adapters.export(f"{tenant}/orders", exported) == version
    stored = json.loads(site.registry.artifacts.read(version, "adapter_config.json"))
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], config["base_model_name_or_path"]) == ("tiny", str(site.base.folder))
    assert (exported / "tokenizer.json").read_text() == "{}"
    card = (exported / "README.md").read_text()
    assert f"base_model: {site.base.folder}" in card and version in card
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        alone = AutoPeftModelForCausalLM.from_pretrained(exported)(tokens).logits
        expected = PeftModel.from_pretrained(base, adapter)(tokens).logits
    assert torch.equal(alone, expected)
