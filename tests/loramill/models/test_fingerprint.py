"""The fingerprint of a base, and the cache of its weights' hash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loramill.errors import BaseUnusable
from loramill.models.catalog import find_base
from loramill.models.fingerprint import relevant_config

from .conftest import CONFIG, change


def test_the_fingerprint_ignores_where_and_how_weights_are_stored(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = find_base(str(folder), cache).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for shard, name in enumerate(weights):
        save_file({name: weights[name]}, copy / f"{shard}.safetensors", metadata={"format": "pt"})
    index = {"weight_map": {name: f"{shard}.safetensors" for shard, name in enumerate(weights)}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    change(copy, _name_or_path="elsewhere", transformers_version="4.0.0", use_cache=False, mlp_bias=False)
    assert find_base(str(copy), cache).fingerprint == first
    (copy / "0.safetensors").unlink()
    with pytest.raises(BaseUnusable, match=r"0\.safetensors is missing"):
        find_base(str(copy), cache)


def test_the_fingerprint_changes_with_weights_and_mathematics(folder: Path, tmp_path: Path) -> None:
    def fingerprint() -> str:
        return find_base(str(folder), tmp_path / "cache").fingerprint

    fingerprints = [fingerprint()]
    for keys in ({"rope_theta": 500000.0}, {"rms_norm_eps": 1e-5}, {"tie_word_embeddings": True}, {"head_dim": 8}):
        change(folder, **keys)
        fingerprints.append(fingerprint())
    weights = load_file(folder / "model.safetensors")
    weights["a.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    fingerprints.append(fingerprint())
    weights["a.weight"] = weights["a.weight"].view(3, 2).contiguous()
    save_file(weights, folder / "model.safetensors")
    fingerprints.append(fingerprint())
    assert len(set(fingerprints)) == len(fingerprints)


def test_only_windows_in_use_change_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    def changed(**keys: object) -> str:
        change(folder, **keys)
        return find_base(str(folder), tmp_path / "cache").fingerprint

    llama = changed()
    assert changed(sliding_window=64, layer_types=["full_attention"]) == llama
    qwen = changed(architectures=["Qwen2ForCausalLM"], use_sliding_window=False)
    assert changed(sliding_window=32) == qwen
    sliding = {changed(use_sliding_window=True), changed(sliding_window=64), changed(max_window_layers=1)}
    mistral = [
        changed(architectures=["MistralForCausalLM"]),
        changed(sliding_window=32),
        changed(sliding_window=None),
    ]
    other = [
        changed(architectures=["Gemma2ForCausalLM"]),
        changed(sliding_window=32),
        changed(layer_types=None),
    ]
    # A setting that is true by default in another family.
    other += [changed(scale_attn_weights=True), changed(scale_attn_weights=False)]
    assert len({qwen, *sliding, *mistral, *other}) == 1 + 3 + 3 + 5
    assert changed(architectures=["LlamaForCausalLM"], sliding_window=None, scale_attn_weights=None) == llama


def test_old_and_new_forms_of_a_configuration_are_equal() -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0}
    old = CONFIG | {"rope_scaling": {"type": "llama3", "factor": 8.0}, "num_key_value_heads": 4, "dtype": "float32"}
    new = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    new |= {"rope_parameters": scaled | {"rope_theta": 10000.0}, "head_dim": 16}
    assert relevant_config(old) == relevant_config(new) != relevant_config(CONFIG)


def test_weights_are_hashed_once_and_again_when_they_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = find_base(str(folder), cache)
    with monkeypatch.context() as patch:
        patch.setattr("loramill.models.fingerprint._hash_tensors", lambda _: pytest.fail("hashed again"))
        assert find_base(str(folder), cache) == first
        os.utime(folder / "model.safetensors")
        with pytest.raises(pytest.fail.Exception):
            find_base(str(folder), cache)


def test_a_base_is_found_without_a_place_for_its_hash(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights").touch()
    assert find_base(str(folder), tmp_path / "cache") == find_base(str(folder), tmp_path / "other")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "every start reads them" in caplog.text


def test_a_damaged_hash_in_the_cache_is_not_used(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = find_base(str(folder), cache)
    (cached,) = (cache / "weights").iterdir()
    cached.write_text("half")
    assert find_base(str(folder), cache) == first
