"""The text model of a multimodal checkpoint against transformers' own model of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from loramill.errors import BaseUnusable
from loramill.models.catalog import find_base, load_for_training
from loramill.sizing.anatomy import anatomy, read_config

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "sliding_window": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def whole(tmp_path: Path) -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    # As published: what is a default of the class is left out.
    file = tmp_path / "whole" / "config.json"
    content = json.loads(file.read_text())
    content["text_config"] = {**TEXT, "model_type": "gemma3_text"}
    file.write_text(json.dumps(content))
    return model


def test_the_base_is_the_text_model_of_the_checkpoint(whole: Gemma3ForConditionalGeneration, tmp_path: Path) -> None:
    found = find_base(str(tmp_path / "whole"), tmp_path / "cache")
    assert (found.name, found.architecture, found.context_length) == ("whole", "Gemma3ForCausalLM", 131_072)
    assert found.folder.is_relative_to(tmp_path / "cache")
    assert (found.folder / "tokenizer.json").is_file()
    tokens = torch.arange(20)[None]
    text = load_for_training(found, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(text(tokens).logits, whole(tokens).logits)
    assert not any("vision" in name for name, _ in text.named_modules())
    # Other users can read it.
    assert {file.stat().st_mode & 0o777 for file in found.folder.glob("*.safetensors")} == {0o644}
    # A second call writes nothing, and takes no lock, which it can't in a folder that is read-only.
    found.folder.with_suffix(".lock").unlink()
    found.folder.with_suffix(".lock").mkdir()
    before = found.folder.stat()
    again = find_base(str(tmp_path / "whole"), tmp_path / "cache")
    assert (again, again.folder.stat()) == (found, before)
    assert [path.name for path in (tmp_path / "cache" / "bases").iterdir() if "." in path.name] == [
        f"{found.folder.name}.lock"
    ]
    own = anatomy(read_config(str(found.folder)))
    assert own == anatomy(read_config(str(tmp_path / "whole")))
    assert own.parameters == sum(weight.numel() for weight in text.parameters())


def test_the_names_of_newer_checkpoints_are_known_too(whole: Gemma3ForConditionalGeneration, tmp_path: Path) -> None:
    file = tmp_path / "whole" / "model.safetensors"
    named = {
        name.replace("language_model.model.", "model.language_model."): part for name, part in load_file(file).items()
    }
    save_file(named, file, metadata={"format": "pt"})
    found = find_base(str(tmp_path / "whole"), tmp_path / "cache")
    text = AutoModelForCausalLM.from_pretrained(found.folder)
    assert torch.equal(text.model.norm.weight, whole.model.language_model.norm.weight)
    assert torch.equal(text.lm_head.weight, whole.lm_head.weight)


def test_a_text_model_without_its_config_is_refused(whole: Gemma3ForConditionalGeneration, tmp_path: Path) -> None:
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps({"architectures": ["Gemma3ForConditionalGeneration"]}))
    with pytest.raises(BaseUnusable, match="text_config"):
        find_base(str(tmp_path / "whole"), tmp_path / "cache")
