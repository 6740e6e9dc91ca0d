"""The parts that `compare` implements itself: bottleneck adapters, prefix tuning in packed rows, greedy answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch.nn.functional import gelu
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loramill.data.encoding import EncodedExample
from loramill.errors import AdapterInvalid
from loramill.jobs.train.forward import configured_forward, loss_and_accuracy
from loramill.pipelines.compare.methods import bottleneck, prefix, transformers

PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17], [21], [5, 6, 7, 8, 9]]
EXAMPLES = [
    EncodedExample((9, 8, 7, 6, 5), 2),
    EncodedExample((9, 8, 4, 3), 3),
    EncodedExample((9, 8, 7, 2, 1, 2, 3), 4),
]


@pytest.fixture
def model(tiny: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).requires_grad_(False).eval()


@torch.no_grad()
def logits(model, prompt: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_bottleneck_adapter_changes_nothing(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model.to(dtype)
    before = logits(model, PROMPTS[1])
    with bottleneck.attach_bottleneck(model, 8, seed=0) as attached:
        assert torch.equal(logits(attached.model, PROMPTS[1]), before)
        assert {weight.dtype for weight in attached.weights.values()} == {torch.float32}


def test_a_bottleneck_adapter_follows_each_sublayer(model: LlamaForCausalLM) -> None:
    """Against the definition, in a forward pass of one layer written out."""
    layer = model.model.layers[0]
    hidden = torch.randn(1, 5, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])

    def adapted(name: str, out: torch.Tensor) -> torch.Tensor:
        down, up = weights[f"{name}.down.weight"], weights[f"{name}.up.weight"]
        inner = gelu(out @ down.T + weights[f"{name}.down.bias"])
        return out + inner @ up.T + weights[f"{name}.up.bias"]

    def attention() -> torch.Tensor:
        return layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]

    plain = attention()
    with bottleneck.attach_bottleneck(model, 8, seed=0) as attached, torch.no_grad():
        weights = attached.weights
        for weight in weights.values():
            weight.normal_(std=0.5)
        found = layer(hidden, position_embeddings=rotary, attention_mask=None)
    after = hidden + adapted("model.layers.0.self_attn.o_proj", plain)
    expected = after + adapted("model.layers.0.mlp.down_proj", layer.mlp(layer.post_attention_layernorm(after)))
    torch.testing.assert_close(found, expected)


def test_bottleneck_adapters_leave_the_base_as_it_was(model: LlamaForCausalLM) -> None:
    before = logits(model, PROMPTS[1])
    with bottleneck.attach_bottleneck(model, 8, seed=0) as attached:
        with torch.no_grad():
            for weight in attached.weights.values():
                weight.normal_()
        assert not torch.allclose(logits(model, PROMPTS[1]), before)
    assert torch.equal(logits(model, PROMPTS[1]), before)


def test_only_the_adapters_get_a_gradient(model: LlamaForCausalLM) -> None:
    with bottleneck.attach_bottleneck(model, 8, seed=0) as attached:
        loss, _ = loss_and_accuracy(attached.model, model, EXAMPLES, 10.0, packing=True)
        torch.autograd.backward(loss)
        assert all(weight.grad is not None for weight in attached.weights.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bottleneck_adapters_are_a_function_of_the_seed(model: LlamaForCausalLM) -> None:
    def drawn(seed: int) -> torch.Tensor:
        with bottleneck.attach_bottleneck(model, 8, seed) as attached:
            return attached.weights["model.layers.1.mlp.down_proj.down.weight"].detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_base_with_other_module_names_is_refused() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with (
        pytest.raises(AdapterInvalid, match="no linears named o_proj or down_proj"),
        bottleneck.attach_bottleneck(gpt, 4, 0),
    ):
        pass


def drawn_prefix(attached) -> None:
    """Weights far from their initial values."""
    with torch.no_grad():
        for weight in attached.weights.values():
            weight.normal_()


def test_an_initial_prefix_equals_the_base_after_its_text(model: LlamaForCausalLM) -> None:
    text = [31, 32, 33, 34]
    expected = logits(model, text + PROMPTS[1])[len(text) :]
    with prefix.attach_prefix(model, text) as attached, torch.no_grad():
        rows = len(PROMPTS[1])
        mask = torch.full((rows, rows), -torch.inf).triu(1)[None, None]
        found = attached.model(
            input_ids=torch.tensor([PROMPTS[1]]), position_ids=torch.arange(rows)[None], attention_mask=mask
        ).logits[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("longest", [64, 4096])
def test_a_packed_prefix_trains_as_peft_does(model: LlamaForCausalLM, packing: bool, longest: int) -> None:
    """Loss and gradient, by each attention path, against PEFT's own forward pass, one example at a time."""
    with prefix.attach_prefix(model, [31, 32, 33]) as attached, configured_forward(model, longest, masked=True):
        drawn_prefix(attached)
        loss, _ = loss_and_accuracy(attached.model, model, EXAMPLES, 1.0, packing=packing)
        torch.autograd.backward(loss)
        (found,) = attached.weights.values()
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    theirs = peft.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        theirs.copy_(found)
    total = torch.zeros(())
    for example in EXAMPLES:
        tokens = torch.tensor([example.tokens])
        labels = tokens.clone()
        labels[:, : example.prompt_length] = -100
        mean = peft(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss
        total = total + mean * (len(example.tokens) - example.prompt_length)
    total.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(found.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_prefix_is_seen_by_layers_with_and_without_a_window() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    windowed = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes, **windows))
    windowed.requires_grad_(False).eval()
    losses = []
    with (
        prefix.attach_prefix(windowed, [31, 32, 33]) as attached,
        configured_forward(windowed, 64, masked=True),
    ):
        drawn_prefix(attached)
        for packing in (True, False):
            losses.append(loss_and_accuracy(attached.model, windowed, EXAMPLES, 1.0, packing=packing)[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_a_prefix_leaves_the_base_as_it_was(model: LlamaForCausalLM) -> None:
    before = logits(model, PROMPTS[1])
    with prefix.attach_prefix(model, [31, 32, 33]) as attached:
        assert len(attached.weights) == 1
        drawn_prefix(attached)
    assert torch.equal(logits(model, PROMPTS[1]), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def generated(model: LlamaForCausalLM, prompt: list[int], new: int, stop: tuple[int, ...]) -> list[int]:
    """Transformers' own greedy answer to one prompt, its stop token left out."""
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return found[:-1] if found[-1] in stop else found


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_greedy_answers_equal_those_of_transformers(
    model: LlamaForCausalLM, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "BATCH", batch)
    limits = [6, 3, 9, 1]
    free = [generated(model, prompt, limit, ()) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    stop = (free[0][3], free[2][5])
    reported: list[int] = []
    found = transformers.greedy(model, PROMPTS, limits, stop, report=reported.append)
    assert found == [generated(model, prompt, limit, stop) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    assert len(found[0]) <= 3 and reported[-1] == len(PROMPTS)


def test_greedy_answers_depend_on_the_prefix(model: LlamaForCausalLM) -> None:
    """A prefix that is initialized from a text answers as the base does after that text."""
    text = [31, 32, 33, 34, 35]
    with prefix.attach_prefix(model, text) as attached:
        found = transformers.greedy(model, PROMPTS, [5] * 4, (), cache=attached.model.cache)
    assert found == [generated(model, text + prompt, 5, ()) for prompt in PROMPTS]
