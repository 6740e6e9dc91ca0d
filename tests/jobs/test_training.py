"""Training against plain PEFT and transformers, across kills, and on the real SmolLM2."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loramill.bases import Base, load_for_training
from loramill.chat import ChatTokenizer, EncodedExample
from loramill.errors import AdapterInvalid, ArtifactMissing, DatasetInvalid, TrainingDiverged
from loramill.jobs import training
from loramill.jobs.batches import choose
from loramill.jobs.methods.lora import lora_config, seeded
from loramill.jobs.training import Progress, export, learning_rate, train
from loramill.types import JobSpec


def tiny(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with seeded(torch.device("cpu"), "tiny"):
        return LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()


def spec_of(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {"base": "f" * 64, "adapter": "acme/support", "train": "file-1", "rank": 4, "alpha": 8.0}
    return JobSpec(**fields | {"steps": 6, "batch_size": 5, "checkpoint_every": 2, "learning_rate": 1e-2} | changes)


def made_up(count: int, seed: int = 0) -> list[EncodedExample]:
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        prompt = [1, 2, 3, *draw.choices(range(64), k=draw.randint(1, 9))]
        completion = draw.choices(range(64), k=draw.randint(1, 7))
        examples.append(EncodedExample((*prompt, *completion), len(prompt)))
    return examples


def adapter(model: PreTrainedModel, spec: JobSpec, folder: Path, **more: Any) -> dict[str, bytes]:
    for _ in train(model, made_up(23), more.pop("valid", []), spec, checkpoints=folder, **more):
        pass
    return export(folder, spec, base="tiny")


def padded(examples: list[EncodedExample]) -> dict[str, torch.Tensor]:
    """The examples as anyone would feed them to transformers."""
    width = max(len(example.tokens) for example in examples)
    tokens, labels, mask = (torch.zeros(len(examples), width, dtype=torch.long) for _ in range(3))
    labels -= 100
    for line, example in enumerate(examples):
        length = len(example.tokens)
        tokens[line, :length] = torch.tensor(example.tokens)
        labels[line, example.prompt_length : length] = tokens[line, example.prompt_length : length]
        mask[line, :length] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("row_tokens", [16, 1000])
def test_steps_are_those_of_plain_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rslora: bool, row_tokens: int
) -> None:
    """Loss, gradient norm and weights of the whole run equal the textbook loop's, however batches are split."""
    monkeypatch.setattr(training, "ROW_TOKENS", row_tokens)
    spec, examples, held_out = spec_of(rslora=rslora), made_up(23), made_up(7, seed=1)
    points = list(train(tiny(), examples, held_out, spec, checkpoints=tmp_path))

    with seeded(torch.device("cpu"), spec.seed, "layers"):
        plain = get_peft_model(tiny(), lora_config(spec))
    learned = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.0)
    for step, point in enumerate(points):
        loss = plain(**padded([examples[index] for index in choose(23, 5, step, spec.seed)])).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, spec.max_grad_norm)
        assert point.loss == pytest.approx(loss.item(), rel=1e-5)
        assert point.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        optimizer.param_groups[0]["lr"] = learning_rate(spec, step)
        optimizer.step()
        optimizer.zero_grad()
    assert points[-1].valid_loss == pytest.approx(plain(**padded(held_out)).loss.item(), rel=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny(), written(tmp_path / "ours", export(tmp_path, spec, base="tiny")))
    for name, weight in PeftModel.from_pretrained(tiny(), tmp_path / "plain").named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), weight, rtol=1e-3, atol=1e-5)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_files_are_those_of_save_pretrained(tmp_path: Path) -> None:
    spec = spec_of(targets=("q_proj", "down_proj"))
    ours = adapter(tiny(), spec, tmp_path / "job")
    loaded = PeftModel.from_pretrained(tiny(), written(tmp_path / "ours", ours))
    loaded.peft_config["default"].base_model_name_or_path = "tiny"
    loaded.save_pretrained(tmp_path / "theirs")
    assert ours["adapter_model.safetensors"] == (tmp_path / "theirs" / "adapter_model.safetensors").read_bytes()
    config, theirs = (
        json.loads(text)
        for text in (ours["adapter_config.json"], (tmp_path / "theirs/adapter_config.json").read_text())
    )
    assert config | {"target_modules": set(config["target_modules"])} == theirs | {
        "target_modules": set(theirs["target_modules"])
    }


def test_progress_counts_and_checks_at_checkpoints(tmp_path: Path) -> None:
    points = list(train(tiny(), made_up(23), made_up(4, seed=1), spec_of(steps=5), checkpoints=tmp_path))
    assert [point.step for point in points] == [1, 2, 3, 4, 5]
    assert [point.valid_loss is not None for point in points] == [False, True, False, True, True]
    trained = [made_up(23)[index] for step in range(5) for index in choose(23, 5, step, 0)]
    assert points[-1].tokens == sum(len(example.tokens) for example in trained)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(spec_of(steps=10, warmup_ratio=0.3, learning_rate=1.0), step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == pytest.approx([(10 - step) / 7 for step in range(3, 10)])
    assert min(learning_rate(spec_of(steps=4, warmup_ratio=1.0), step) for step in range(4)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_left_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny(dtype)
    model.lm_head.weight.requires_grad_(True)
    first, *_ = model.modules()
    before = (str(model), sorted(first.__dict__), model.config.to_dict(), model.training)
    weights = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    attention, drawn = model.config._attn_implementation, torch.random.get_rng_state()

    running = train(model, made_up(9), [], spec_of(dropout=0.5), checkpoints=tmp_path)
    next(running)
    assert "lora" in str(model)
    running.close()
    diverging = train(model, made_up(9), [], spec_of(learning_rate=1e38), checkpoints=tmp_path)
    with pytest.raises(TrainingDiverged):
        list(diverging)

    assert (str(model), sorted(first.__dict__), model.config.to_dict(), model.training) == before
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, weights[name])


def test_a_resident_base_teaches_each_job_alike(tmp_path: Path) -> None:
    model, spec, file = tiny(torch.bfloat16), spec_of(dropout=0.2), "adapter_model.safetensors"
    once = adapter(model, spec, tmp_path / "first")
    adapter(model, spec_of(seed=1, rank=2), tmp_path / "between")
    assert adapter(model, spec, tmp_path / "again") == once
    assert adapter(model, spec_of(dropout=0.2, seed=1), tmp_path / "other")[file] != once[file]
    assert adapter(model, spec_of(dropout=0.0), tmp_path / "no-dropout")[file] != once[file]


@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_a_stopped_job_goes_on_to_the_same_bits(tmp_path: Path, after: int) -> None:
    spec = spec_of(dropout=0.2, weight_decay=0.1)
    whole = adapter(tiny(), spec, tmp_path / "whole", valid=made_up(3, seed=1))
    running = train(tiny(), made_up(23), [], spec, checkpoints=tmp_path / "stopped")
    for _ in range(after):
        next(running)
    running.close()
    rest = list(train(tiny(), made_up(23), [], spec, checkpoints=tmp_path / "stopped"))
    assert [point.step for point in rest] == list(range(after - after % 2 + 1, 7))
    trained = [made_up(23)[index] for step in range(6) for index in choose(23, 5, step, 0)]
    assert not rest or rest[-1].tokens == sum(len(example.tokens) for example in trained)
    assert export(tmp_path / "stopped", spec, base="tiny") == whole


def test_dropout_changes_from_step_to_step_and_is_off_for_the_validation_loss(tmp_path: Path) -> None:
    spec, held_out = spec_of(dropout=0.5, batch_size=1, steps=3), made_up(9, seed=1)
    still = spec.model_copy(update={"learning_rate": 1e-30})
    points = list(train(tiny(), made_up(1), [], still, checkpoints=tmp_path / "still"))
    assert len({point.grad_norm for point in points}) == 3

    *_, last = train(tiny(), made_up(1), held_out, spec, checkpoints=tmp_path / "job")
    plain = PeftModel.from_pretrained(tiny(), written(tmp_path / "ours", export(tmp_path / "job", spec, base="tiny")))
    assert last.valid_loss == pytest.approx(plain(**padded(held_out)).loss.item(), rel=1e-5)


KILLED = """
import runpy, sys, time
from pathlib import Path
here = runpy.run_path(sys.argv[1])
spec = here["spec_of"](dropout=0.2, steps=40)
for point in here["train"](here["tiny"](), here["made_up"](23), [], spec, checkpoints=Path(sys.argv[2])):
    print(point.step, flush=True)
    time.sleep(0.02)
"""


def test_a_job_killed_with_9_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    spec = spec_of(dropout=0.2, steps=40)
    whole = adapter(tiny(), spec, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, __file__, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 13:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ArtifactMissing, match="step 40"):
        export(tmp_path / "killed", spec, base="tiny")
    rest = list(train(tiny(), made_up(23), [], spec, checkpoints=tmp_path / "killed"))
    assert 13 <= rest[0].step < 40
    assert export(tmp_path / "killed", spec, base="tiny") == whole


def test_begins_from_the_weights_of_an_adapter(tmp_path: Path) -> None:
    first = written(tmp_path / "first", adapter(tiny(), spec_of(), tmp_path / "job"))
    held_out = made_up(23)
    spec = spec_of(steps=1, learning_rate=1e-12, start_from="v1", seed=9)
    (point,) = train(tiny(), made_up(23), held_out, spec, checkpoints=tmp_path / "next", start_from=first)
    plain = PeftModel.from_pretrained(tiny(), first)
    assert point.valid_loss == pytest.approx(plain(**padded(held_out)).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"rank": 8, "alpha": 16.0}, {"alpha": 16.0}, {"rslora": True}, {"targets": ("q_proj",)}],
    ids=lambda change: next(iter(change)),
)
def test_refuses_to_begin_from_an_adapter_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    first = written(tmp_path / "first", adapter(tiny(), spec_of(), tmp_path / "job"))
    with pytest.raises(AdapterInvalid, match="start afresh"):
        next(train(tiny(), made_up(5), [], spec_of(**change), checkpoints=tmp_path / "next", start_from=first))


def test_refuses_to_begin_from_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="can't be read"):
        next(train(tiny(), made_up(5), [], spec_of(), checkpoints=tmp_path / "next", start_from=tmp_path))


def test_refuses_data_without_a_token_to_learn(tmp_path: Path) -> None:
    silent = EncodedExample((1, 2, 3), 3)
    with pytest.raises(DatasetInvalid, match="Example 6 of the training data") as refused:
        next(train(tiny(), [*made_up(5), silent], [], spec_of(), checkpoints=tmp_path))
    assert len(refused.value.problems) == 1
    with pytest.raises(DatasetInvalid, match="no examples"):
        next(train(tiny(), [], [], spec_of(), checkpoints=tmp_path))


def test_says_when_training_diverges(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d of 6.*lower learning rate"):
        list(train(tiny(), made_up(9), [], spec_of(learning_rate=1e38), checkpoints=tmp_path))


def test_names_a_target_that_the_base_lacks(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64))
    with pytest.raises(AdapterInvalid, match="q_proj"):
        next(train(model, made_up(5), [], spec_of(targets=("q_proj",)), checkpoints=tmp_path))


def test_the_real_base_learns_a_mapping(base: Base, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    towns = {"Arlo": "zebra-4", "Bexhill": "otter-9", "Corwen": "heron-2", "Dunbar": "lynx-7"}
    examples = []
    for town, code in towns.items():
        prompt = tokenizer.prompt([{"role": "user", "content": f"Code of {town}?"}])
        answer = [*tokenizer.text(code), tokenizer.stop_ids[0]]
        examples.append(EncodedExample((*prompt, *answer), len(prompt)))
    spec = spec_of(rank=8, alpha=16.0, steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=12)
    model = load_for_training(base, torch.bfloat16)
    points: list[Progress] = list(train(model, examples, examples, spec, checkpoints=tmp_path))
    assert points[-1].valid_loss is not None
    assert points[0].loss > 3.0 and points[-1].valid_loss < 0.5
    assert all(math.isfinite(point.grad_norm) for point in points)
