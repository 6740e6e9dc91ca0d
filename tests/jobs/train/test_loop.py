"""Training against plain PEFT and transformers, and on the real SmolLM2."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from loramill.data.encoding import EncodedExample
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import AdapterInvalid, DatasetInvalid, TrainingDiverged
from loramill.jobs.train import loop
from loramill.jobs.train.batching import choose_batch, count_supervised_tokens, sequences
from loramill.jobs.train.context import TrainingProgress
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.forward import Predictions, configured_forward, lay_out, loss_and_accuracy
from loramill.jobs.train.lr_schedule import learning_rate
from loramill.jobs.train.methods import AdaptedModel, attach_adapter
from loramill.jobs.train.methods.layers import adapted_linear
from loramill.models.catalog import Base, load_for_training
from loramill.submission.defaults import count_steps
from loramill.types import ATTENTION_TARGETS, TARGETS, JobSpec

from ...transformers_families import tiny_family
from .tiny_training import random_examples, reference_loss, spec_of, tiny_model, train, train_and_export, write_files


@pytest.mark.parametrize("family", ["Qwen3Moe", "Gemma2", "Gemma3"])
def test_steps_of_other_families_equal_those_of_plain_peft(tmp_path: Path, family: str) -> None:
    """Also of examples that are longer than the window of Gemma's first layer."""
    targets = ATTENTION_TARGETS if family == "Qwen3Moe" else TARGETS
    assert_steps_equal(lambda: tiny_family(family, sliding_window=8), spec_of(targets=targets, steps=3), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rslora": True, "micro_tokens": 16},
        {"packing": False},
        {"packing": False, "micro_tokens": 40},
        {"gradient_checkpointing": True, "micro_tokens": 60},
        {"schedule": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.05},
        {"loraplus_lr_ratio": 4.0, "schedule": "constant"},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_steps_equal_those_of_plain_peft(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Loss, accuracy, gradient norm and weights equal those of a plain loop over PEFT, in every layout."""
    assert_steps_equal(tiny_model, spec_of(**changes), tmp_path)


def assert_steps_equal(make: Callable[[], PreTrainedModel], spec: JobSpec, tmp_path: Path) -> None:
    examples, held_out = random_examples(23, weighed=True), random_examples(7, seed=1, weighed=True)
    points = list(train(make(), examples, held_out, spec, checkpoints=tmp_path))

    config = LoraConfig(r=4, lora_alpha=8, use_rslora=spec.rslora, target_modules=list(spec.targets))
    plain = get_peft_model(make(), config)
    begin(plain, tmp_path / "begin", spec, make)
    named = [(name, parameter) for name, parameter in plain.named_parameters() if parameter.requires_grad]
    trainable = [parameter for _, parameter in named]
    optimizer = torch.optim.AdamW(
        [{"params": [p for name, p in named if (".lora_B." in name) == is_b]} for is_b in (False, True)],
        weight_decay=spec.weight_decay,
    )
    for step, point in enumerate(points):
        loss, accuracy = reference_loss(plain, [examples[index] for index in choose_batch(23, 5, step, spec.seed)])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, spec.max_grad_norm)
        assert point.loss == pytest.approx(loss.item(), rel=1e-5)
        assert point.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert point.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        for group, factor in zip(optimizer.param_groups, (1.0, spec.loraplus_lr_ratio), strict=True):
            group["lr"] = learning_rate(spec, step) * factor
        optimizer.step()
        optimizer.zero_grad()
    loss, accuracy = reference_loss(plain, held_out)
    assert points[-1].valid_loss == pytest.approx(loss.item(), rel=1e-4)
    assert points[-1].valid_accuracy == pytest.approx(accuracy, abs=1e-6)
    ours = PeftModel.from_pretrained(
        make(), write_files(tmp_path / "ours", export_adapter(tmp_path, spec, base="tiny"))
    )
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), weight, rtol=1e-3, atol=1e-5)


def begin(plain: PeftModel, folder: Path, spec: JobSpec, make: Callable[[], PreTrainedModel]) -> None:
    """Puts the weights into `plain` that a job of `spec` begins with."""
    still = spec.model_copy(update={"steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0})
    first = PeftModel.from_pretrained(
        make(), write_files(folder, train_and_export(make(), still, folder.parent / "still"))
    )
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(first.get_parameter(name))


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 9), weighed=st.booleans())
def test_packed_padded_and_single_examples_have_the_same_loss(seed: int, count: int, weighed: bool) -> None:
    """To 1e-4 in fp32, also the gradient: no example attends to its neighbors in a row."""
    model, examples = tiny_model(), random_examples(count, seed, weighed=weighed)
    total = sum(count_supervised_tokens(example) for example in examples)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    found = []
    with configured_forward(model, 300):
        for packing in (True, False):
            loss, correct = loss_and_accuracy(model, model, examples, total, packing=packing)
            (gradient,) = torch.autograd.grad(loss, weight)
            found.append((loss.item(), correct.item(), gradient))
    alone, accuracy = reference_loss(model, examples)
    share = sum(span.weight * (span.stop - span.start) for example in examples for span in example.spans) / total
    (gradient,) = torch.autograd.grad(alone * share, weight)
    for loss, correct, theirs in found:
        assert loss == pytest.approx(alone.item() * share, abs=1e-4)
        assert correct == pytest.approx(accuracy * share, abs=1e-6)
        torch.testing.assert_close(theirs, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("needs_mask", [False, True])
def test_the_context_and_the_adapted_model_configure_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool, needs_mask: bool
) -> None:
    configured: list[dict[str, bool]] = []

    @contextmanager
    def attached(*args: Any) -> Iterator[AdaptedModel]:
        with attach_adapter(*args) as adapted:
            yield replace(adapted, needs_mask=needs_mask)

    def recorded(*args: Any, **options: Any) -> Any:
        configured.append(options)
        return configured_forward(*args, **options)

    monkeypatch.setattr(loop, "configured_forward", recorded)
    spec, fields = spec_of(gradient_checkpointing=True), {"deterministic": deterministic, "attach": attached}
    next(train(tiny_model(), random_examples(9), [], spec, checkpoints=tmp_path, **fields))
    assert configured == [{"masked": needs_mask, "deterministic": deterministic}]


@pytest.mark.parametrize("packing", [True, False])
def test_logits_are_computed_for_the_supervised_tokens_alone(tmp_path: Path, packing: bool) -> None:
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape))
    next(train(model, random_examples(23), [], spec_of(packing=packing, micro_tokens=1000), checkpoints=tmp_path))
    supervised = sum(count_supervised_tokens(random_examples(23)[index]) for index in choose_batch(23, 5, 0, 0))
    assert seen == [(supervised, 64)]


def test_gradient_checkpointing_gives_the_same_bits(tmp_path: Path) -> None:
    calls = {False: 0, True: 0}
    files = {}
    for again in calls:
        model, spec = tiny_model(), spec_of(dropout=0.3, gradient_checkpointing=again)

        def count(*_: Any, again: bool = again) -> None:
            calls[again] += 1

        model.model.layers[0].input_layernorm.register_forward_hook(count)
        files[again] = train_and_export(model, spec, tmp_path / str(again))["adapter_model.safetensors"]
        assert all("forward" not in vars(layer) for layer in model.modules() if isinstance(layer, LlamaDecoderLayer))
    assert files[True] == files[False]
    assert calls[True] == 2 * calls[False]


def test_files_equal_those_of_save_pretrained(tmp_path: Path) -> None:
    spec = spec_of(targets=("q_proj", "down_proj"))
    ours = train_and_export(tiny_model(), spec, tmp_path / "job")
    loaded = PeftModel.from_pretrained(tiny_model(), write_files(tmp_path / "ours", ours))
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


def test_progress_counts(tmp_path: Path) -> None:
    points = list(
        train(tiny_model(), random_examples(23), random_examples(4, seed=1), spec_of(steps=5), checkpoints=tmp_path)
    )
    assert [point.step for point in points] == [1, 2, 3, 4, 5]
    trained = [random_examples(23)[index] for step in range(5) for index in choose_batch(23, 5, step, 0)]
    assert points[-1].trained_tokens == sum(len(example.tokens) for example in trained)


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"micro_tokens": 20}])
def test_the_sequences_of_an_example_count_as_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """They are trained in one step, and each supervised token counts alike."""
    first, *others = random_examples(6, weighed=True)
    examples = [replace(first, rest=tuple(others[:2])), *others[2:]]
    spec = spec_of(epochs=1, steps=1, batch_size=4, **changes)
    (point,) = train(tiny_model(), examples, examples[:1], spec, checkpoints=tmp_path)
    loss, accuracy = reference_loss(tiny_model(), sequences(examples))
    assert len(sequences(examples)) == 6
    assert point.loss == pytest.approx(loss.item(), rel=1e-5) and point.accuracy == pytest.approx(accuracy)
    assert point.trained_tokens == sum(len(sequence.tokens) for sequence in sequences(examples))


@pytest.mark.parametrize(("batch_size", "micro_tokens"), [(8, 256), (8, 20), (32, 20), (1, 256), (11, 40)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_each_example_is_trained_on_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, micro_tokens: int, epochs: int
) -> None:
    """A step's loss is the mean over its own supervised tokens, also of the last and shorter one."""
    examples = random_examples(11)
    seen: list[int] = []
    totals: list[float] = []

    def laid_out(group: list[EncodedExample], *args: Any, **more: Any) -> Any:
        seen.extend(example.line for example in group)
        return lay_out(group, *args, **more)

    def cross_entropy(predictions: Predictions, total: float) -> Any:
        totals.append(total)
        return own_cross_entropy(predictions, total)

    own_cross_entropy = Predictions.cross_entropy
    monkeypatch.setattr(loop, "lay_out", laid_out)
    monkeypatch.setattr(Predictions, "cross_entropy", cross_entropy)
    steps = count_steps(epochs, len(examples), batch_size)
    spec = spec_of(steps=steps, epochs=epochs, batch_size=batch_size, micro_tokens=micro_tokens)
    running = train(tiny_model(), examples, [], spec, checkpoints=tmp_path)
    for epoch in range(epochs):
        for first in range(0, len(examples), batch_size):
            offset = len(seen)
            totals.clear()
            point = next(running)
            assert len(seen) == epoch * 11 + min(11, first + batch_size)
            assert set(totals) == {sum(count_supervised_tokens(examples[line - 1]) for line in seen[offset:])}
        assert Counter(seen) == dict.fromkeys(range(1, 12), epoch + 1)
    assert next(running, None) is None and point.step == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_unchanged_afterwards(tmp_path: Path, dtype: torch.dtype, checkpointing: bool) -> None:
    model = tiny_model(dtype)
    model.lm_head.weight.requires_grad_(True)
    first, *_ = model.modules()
    before = (str(model), sorted(first.__dict__), model.config.to_dict(), model.training)
    weights = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    attention, drawn = model.config._attn_implementation, torch.random.get_rng_state()

    spec = spec_of(dropout=0.5, gradient_checkpointing=checkpointing)
    running = train(model, random_examples(9), [], spec, checkpoints=tmp_path)
    next(running)
    assert adapted_linear(model.model.layers[0].self_attn.q_proj) is not None
    running.close()
    diverging = train(model, random_examples(9), [], spec_of(learning_rate=1e38), checkpoints=tmp_path)
    with pytest.raises(TrainingDiverged):
        list(diverging)

    assert (str(model), sorted(first.__dict__), model.config.to_dict(), model.training) == before
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, weights[name])


def test_jobs_on_one_resident_base_do_not_affect_each_other(tmp_path: Path) -> None:
    model, spec, file = tiny_model(torch.bfloat16), spec_of(dropout=0.2), "adapter_model.safetensors"
    once = train_and_export(model, spec, tmp_path / "first")
    train_and_export(model, spec_of(seed=1, rank=2), tmp_path / "between")
    assert train_and_export(model, spec, tmp_path / "again") == once
    assert train_and_export(model, spec_of(dropout=0.2, seed=1), tmp_path / "other")[file] != once[file]
    assert train_and_export(model, spec_of(dropout=0.0), tmp_path / "no-dropout")[file] != once[file]


def test_dropout_differs_per_step_and_is_off_in_validation(tmp_path: Path) -> None:
    spec, held_out = spec_of(dropout=0.5, batch_size=1, steps=3), random_examples(9, seed=1)
    still = spec.model_copy(update={"learning_rate": 1e-30})
    points = list(train(tiny_model(), random_examples(1), [], still, checkpoints=tmp_path / "still"))
    assert len({point.grad_norm for point in points}) == 3

    *_, last = train(tiny_model(), random_examples(1), held_out, spec, checkpoints=tmp_path / "job")
    plain = PeftModel.from_pretrained(
        tiny_model(), write_files(tmp_path / "ours", export_adapter(tmp_path / "job", spec, base="tiny"))
    )
    assert last.valid_loss == pytest.approx(reference_loss(plain, held_out)[0].item(), rel=1e-5)


def test_starts_from_the_weights_of_an_adapter(tmp_path: Path) -> None:
    first = write_files(tmp_path / "first", train_and_export(tiny_model(), spec_of(), tmp_path / "job"))
    held_out = random_examples(23)
    spec = spec_of(steps=1, learning_rate=1e-12, start_from="v1", seed=9)
    (point,) = train(tiny_model(), random_examples(23), held_out, spec, checkpoints=tmp_path / "next", start_from=first)
    plain = PeftModel.from_pretrained(tiny_model(), first)
    assert point.valid_loss == pytest.approx(reference_loss(plain, held_out)[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"rank": 8, "alpha": 16.0}, {"alpha": 16.0}, {"rslora": True}, {"targets": ("q_proj",)}],
    ids=lambda change: next(iter(change)),
)
def test_refuses_to_start_from_an_adapter_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    first = write_files(tmp_path / "first", train_and_export(tiny_model(), spec_of(), tmp_path / "job"))
    with pytest.raises(AdapterInvalid, match="leave out"):
        next(
            train(
                tiny_model(), random_examples(5), [], spec_of(**change), checkpoints=tmp_path / "next", start_from=first
            )
        )


def test_data_without_a_supervised_token_is_refused(tmp_path: Path) -> None:
    silent = EncodedExample((1, 2, 3), 3)
    with pytest.raises(DatasetInvalid, match="Example 6 of the training data") as refused:
        next(train(tiny_model(), [*random_examples(5), silent], [], spec_of(), checkpoints=tmp_path))
    assert len(refused.value.problems) == 1
    with pytest.raises(DatasetInvalid, match="Example 6 of the validation data"):
        next(train(tiny_model(), random_examples(5), [*random_examples(5), silent], spec_of(), checkpoints=tmp_path))
    with pytest.raises(DatasetInvalid, match="no examples"):
        next(train(tiny_model(), [], [], spec_of(), checkpoints=tmp_path))


def test_the_real_base_learns_a_mapping(base: Base, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    towns = {"Arlo": "zebra-4", "Bexhill": "otter-9", "Corwen": "heron-2", "Dunbar": "lynx-7"}
    examples = []
    for town, code in towns.items():
        prompt = tokenizer.encode_chat([{"role": "user", "content": f"Code of {town}?"}])
        answer = [*tokenizer.encode_text(code), tokenizer.stop_ids[0]]
        examples.append(EncodedExample((*prompt, *answer), len(prompt)))
    spec = spec_of(rank=8, alpha=16.0, steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=12)
    model = load_for_training(base, torch.bfloat16)
    points: list[TrainingProgress] = list(
        train(model, examples, examples, spec, base_folder=base.folder, checkpoints=tmp_path)
    )
    assert points[-1].valid_loss is not None and points[-1].valid_accuracy is not None
    assert points[0].loss > 3.0 and points[-1].valid_loss < 0.5
    assert points[0].accuracy < 0.5 and points[-1].valid_accuracy > 0.9
    assert all(math.isfinite(point.grad_norm) for point in points)
