"""The training's own attention and loss against torch's, in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from loramill.data.encoding import EncodedExample
from loramill.jobs.train import forward
from loramill.jobs.train.batching import pack, pad
from loramill.jobs.train.forward import (
    attention_window,
    configured_forward,
    frozen_head,
    loss_and_accuracy,
    recomputed_layers,
    shares_passes,
)
from loramill.jobs.train.ops import attention
from loramill.jobs.train.ops.attention import VARLEN_NAMES, PartsLayout, VarlenLayout, attend_parts, attend_varlen
from loramill.jobs.train.ops.loss import cross_entropy, cross_entropy_of_head
from loramill.jobs.train.ops.norm import rms_norm
from loramill.kernels.attention import varlen

from .tiny_training import random_examples, tiny_model

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def near(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    assert (ours.float() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_equals_eager_attention(dtype: torch.dtype, heads: int, kv_heads: int, rows: int) -> None:
    tokens, width = 17, 24  # whose square root is not a power of two
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        made = torch.randn(rows, tokens, count, width, generator=generator).to(dtype)
        return made.transpose(1, 2).requires_grad_(True)

    inputs = [drawn(heads), drawn(kv_heads), drawn(kv_heads)]
    exact = [each.detach().float().requires_grad_(True) for each in inputs]
    owner = torch.arange(tokens) // 6
    attended = (owner[:, None] == owner).tril()
    mask = torch.zeros(rows, 1, tokens, tokens).masked_fill(~attended, -math.inf)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False)
    theirs, _ = eager_attention_forward(module, *exact, mask, width**-0.5)  # type: ignore[arg-type]
    part = SimpleNamespace(tokens=torch.zeros(rows, tokens))
    layout = PartsLayout([part], masks={(0, None): mask.to(dtype)})  # type: ignore[list-item]
    flat = [each.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for each in inputs]
    ours, _ = attend_parts(module, *flat, None, width**-0.5, row_layout=layout)  # type: ignore[arg-type]
    ours = ours.view(rows, tokens, heads, width)
    near(ours, theirs, dtype)
    back = torch.randn(theirs.shape, generator=generator)
    gradients = torch.autograd.grad(theirs, exact, back)
    for own, other in zip(torch.autograd.grad(ours, inputs, back.to(dtype)), gradients, strict=True):
        near(own, other, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 200.0])  # large logits overflow what isn't shifted
def test_loss_is_the_weighted_cross_entropy(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(11, 301, generator=generator) * size).to(dtype).requires_grad_(True)
    labels = torch.randint(301, (11,), generator=generator)
    labels[:4] = logits[:4].argmax(-1)
    weights = torch.rand(11, generator=generator)
    before = logits.detach().clone()
    loss, correct = cross_entropy(logits, labels, weights)
    exact = logits.detach().double().requires_grad_(True)
    theirs = (F.cross_entropy(exact, labels, reduction="none") * weights).sum()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert correct.item() == pytest.approx(weights[exact.argmax(-1) == labels].sum().item())
    near(*torch.autograd.grad(loss * 3, logits), torch.autograd.grad(theirs * 3, exact)[0].float(), dtype)
    assert torch.equal(logits, before)


def test_a_loss_without_gradient_keeps_nothing() -> None:
    logits = torch.randn(3, 7)
    loss, correct = cross_entropy(logits, torch.tensor([1, 2, 3]), torch.ones(3))
    assert not loss.requires_grad and not correct.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(40, eps=0.3).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    x = torch.randn(2, 7, 40, generator=generator).to(dtype).requires_grad_(True)
    exact = x.detach().float().requires_grad_(True)
    back = torch.randn(2, 7, 40, generator=generator)
    theirs = norm(exact)
    ours = rms_norm(norm.to(dtype), x)
    near(ours, theirs, dtype)
    near(*torch.autograd.grad(ours, x, back.to(dtype)), torch.autograd.grad(theirs, exact, back)[0], dtype)


def test_a_norm_that_is_trained_keeps_its_own_forward() -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(True)
    with configured_forward(model, 300):
        assert "forward" in vars(model.model.layers[0].input_layernorm) and "forward" not in vars(model.model.norm)
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_supported_models_share_passes() -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_key_value_heads=2, **small))
    for model in (tiny_model(), qwen):
        for longest in (300, 3000):
            with configured_forward(model, longest):
                assert shares_passes(model) and model.config._attn_implementation == attention.PARTS_NAME
            with configured_forward(model, longest, masked=True):
                assert not shares_passes(model)
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8))
    for longest, name in ((300, "eager"), (3000, "sdpa")):
        with configured_forward(other, longest):
            assert not shares_passes(other) and other.config._attn_implementation == name


CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def laid_out(prefix: int, lengths: Sequence[int]) -> list[EncodedExample]:
    """Examples with a common prefix of `prefix` tokens, each with its own last tokens."""
    return [
        EncodedExample((*range(prefix), *[100 * number + place for place in range(length)]), prefix + 1)
        for number, length in enumerate(lengths, start=1)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(
    ("layout", "prefix", "lengths"),
    [(pack, 7, (3, 9, 2)), (pack, 1, (5, 2)), (pack, 0, (4, 2, 6)), (pack, 5, (8,)), (pad, 0, (6, 6, 4))],
    ids=lambda value: getattr(value, "__name__", str(value)),  # without a function's address
)
def test_attention_over_a_layout_equals_attention_with_its_mask(
    dtype: torch.dtype, heads: int, kv_heads: int, layout: Any, prefix: int, lengths: Sequence[int]
) -> None:
    rows = layout(laid_out(prefix, lengths))
    assert rows.prefix_tokens == prefix
    count, tokens = rows.tokens.shape
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> torch.Tensor:
        made = torch.randn(count, tokens, heads, 24, generator=generator).to(dtype)
        return made.transpose(1, 2).requires_grad_(True)

    inputs = [drawn(heads), drawn(kv_heads), drawn(kv_heads)]
    exact = [each.detach().float().requires_grad_(True) for each in inputs]
    mask = torch.zeros(count, 1, tokens, tokens).masked_fill(~rows.attention_mask()[:, None], -math.inf)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False)
    theirs, _ = eager_attention_forward(module, *exact, mask, 24**-0.5)  # type: ignore[arg-type]
    ours, _ = attend_varlen(module, *inputs, None, 24**-0.5, row_layout=VarlenLayout.of([rows], CPU))  # type: ignore[arg-type]
    near(ours, theirs, dtype)
    back = torch.randn(theirs.shape, generator=generator)
    gradients = torch.autograd.grad(theirs, exact, back)
    for own, other in zip(torch.autograd.grad(ours, inputs, back.to(dtype)), gradients, strict=True):
        near(own, other, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("prefix", "lengths"), [(70, (300, 9, 200)), (0, (40, 200)), (50, (80,))], ids=str)
def test_attention_over_a_layout_on_this_gpu_equals_that_on_a_cpu(prefix: int, lengths: Sequence[int]) -> None:
    rows = pack(laid_out(prefix, lengths))
    generator = torch.Generator().manual_seed(0)
    tokens = rows.tokens.shape[1]
    drawn = [torch.randn(1, tokens, heads, 64, generator=generator).bfloat16() for heads in (8, 2, 2)]
    back = torch.randn(1, tokens, 8, 64, generator=generator).bfloat16()
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16), ("cuda", torch.bfloat16)):
        inputs = [each.to(device, dtype).transpose(1, 2).requires_grad_(True) for each in drawn]
        layout = VarlenLayout.of([rows], torch.device(device))
        out, _ = attend_varlen(None, *inputs, None, 0.125, row_layout=layout, deterministic=True)  # type: ignore[arg-type]
        found.append([out.detach().cpu(), *(part.cpu() for part in torch.autograd.grad(out, inputs, back.to(out)))])
    for exact, first, second in zip(*found, strict=True):
        near(first, exact, torch.bfloat16)
        assert torch.equal(first, second)


def test_a_layout_has_a_part_for_the_prefix_only_if_examples_share_it() -> None:
    shared = VarlenLayout.of([pack(laid_out(7, (3, 9)))], CPU)
    assert shared.own.row_starts.tolist() == shared.own.key_starts.tolist() == [0, 7, 10, 19]
    [prefix] = shared.prefixes
    assert (prefix.rows, prefix.keys) == (slice(7, 19), slice(0, 7))
    assert (prefix.batch.row_starts.tolist(), prefix.batch.key_starts.tolist()) == ([0, 12], [0, 7])
    single = VarlenLayout.of([pack(laid_out(7, (3,)))], CPU)
    assert (single.own.row_starts.tolist(), single.prefixes) == ([0, 10], ())
    padded = VarlenLayout.of([pad(laid_out(2, (3, 1)))], CPU)
    assert (padded.own.row_starts.tolist(), padded.prefixes) == ([0, 5, 10], ())
    both = VarlenLayout.of([pad(laid_out(2, (3, 1))), pack(laid_out(7, (3, 9)))], CPU)
    assert both.own.row_starts.tolist() == [0, 5, 10, 17, 20, 29]
    assert [(each.rows, each.keys) for each in both.prefixes] == [(slice(17, 29), slice(10, 17))]


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_the_deterministic_name_makes_gradients_deterministic(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    flags = []
    backward = varlen.backward

    def recorded(*args: Any, deterministic: bool, **options: Any) -> Any:
        flags.append(deterministic)
        return backward(*args, **options)

    monkeypatch.setattr(varlen, "backward", recorded)
    model = tiny_model()
    model.set_attn_implementation(VARLEN_NAMES[deterministic])
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    loss_and_accuracy(model, model, random_examples(3), 10.0, packing=True)[0].backward()
    assert flags and set(flags) == {deterministic}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_model_without_a_mask_has_the_loss_and_gradients_of_one_with_a_mask(
    monkeypatch: pytest.MonkeyPatch, packing: bool, checkpointing: bool
) -> None:
    model, examples, found = tiny_model(), random_examples(6), []
    weights = [layer.self_attn.k_proj.weight.requires_grad_(True) for layer in model.model.layers]
    for name in (None, VARLEN_NAMES[False]):
        monkeypatch.setattr(forward, "_attention", lambda *_, name=name, **__: name)
        with configured_forward(model, 300), recomputed_layers(model, checkpointing):
            loss, correct = loss_and_accuracy(model, model, examples, 20.0, packing=packing)
            found.append((loss.detach(), correct, *torch.autograd.grad(loss, weights)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


WINDOWED: dict[str, Any] = {
    "mistral": MistralConfig(sliding_window=8, **SMALL),
    "mistral, types unused": MistralConfig(sliding_window=8, layer_types=["full_attention"] * 2, **SMALL),
    "qwen2": Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, **SMALL),
    "gemma2": Gemma2Config(sliding_window=8, head_dim=8, **SMALL),
    "gemma3": Gemma3TextConfig(sliding_window=8, head_dim=8, sliding_window_pattern=2, **SMALL),
    "qwen3 moe": Qwen3MoeConfig(
        use_sliding_window=True,
        sliding_window=8,
        moe_intermediate_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        **SMALL,
    ),
    "no window": Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=2, **SMALL),
    "long window": MistralConfig(sliding_window=99, **SMALL),
}


def windowed_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(WINDOWED[name])
    return model.requires_grad_(False).eval()


def loss_of_transformers(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> torch.Tensor:
    """The summed loss of each example alone, by the attention and the masks of transformers."""
    model.set_attn_implementation("eager")
    losses = []
    for example in examples:
        tokens = torch.tensor([example.tokens])
        logits = model(input_ids=tokens).logits[0, :-1]
        for span in example.spans:
            part = slice(span.start - 1, span.stop - 1)
            losses.append(span.weight * F.cross_entropy(logits[part], tokens[0, 1:][part], reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3"])
def test_examples_longer_than_a_window_see_what_they_see_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, examples = windowed_model(name), random_examples(6, weighed=True)
    assert max(len(example.tokens) for example in examples) > 8
    monkeypatch.setattr(forward, "_attention", lambda *_, **__: VARLEN_NAMES[False])
    assert attention_window(model) is None  # masks go by positions
    with configured_forward(model, 300):
        assert attention_window(model) == 8
        together, _ = loss_and_accuracy(model, model, examples, 1.0, packing=True)
        alone = [loss_and_accuracy(model, model, [example], 1.0, packing=True)[0] for example in examples]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, loss_of_transformers(model, examples), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("short", [True, False], ids=["short rows", "long rows"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_cpu_trains_with_the_windows_of_transformers(
    name: str, packing: bool, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_EAGER_TOKENS", 512 if short else 0)
    model, examples = windowed_model(name), random_examples(6, weighed=True)
    weights = [layer.self_attn.k_proj.weight.requires_grad_(True) for layer in model.model.layers]
    with configured_forward(model, 300):
        ours, _ = loss_and_accuracy(model, model, examples, 1.0, packing=packing)
        gradients = torch.autograd.grad(ours, weights)
    theirs = loss_of_transformers(model, examples)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for own, other in zip(gradients, torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "changes", "options", "expected"),
    [
        (torch.bfloat16, {}, {}, VARLEN_NAMES[False]),
        (torch.bfloat16, {}, {"deterministic": True}, VARLEN_NAMES[True]),
        (torch.bfloat16, {}, {"masked": True}, "sdpa"),
        (torch.float32, {}, {}, "sdpa"),
        (torch.bfloat16, {"head_dim": 12}, {}, "sdpa"),
        (torch.bfloat16, {"attn_logit_softcapping": 50.0}, {}, "sdpa"),
    ],
)
def test_the_attention_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    changes: dict[str, Any],
    options: dict[str, bool],
    expected: str,
) -> None:
    model = tiny_model(dtype)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr("loramill.jobs.train.ops.layers.triton_problem", lambda _: None)
    for name, value in changes.items():
        setattr(model.config, name, value)
    with configured_forward(model, 300, **options):
        assert model.config._attn_implementation == expected
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 11, 12])
def test_the_loss_of_a_head_in_parts_equals_that_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int
) -> None:
    monkeypatch.setattr("loramill.jobs.train.ops.loss.HEAD_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_(True)
    weight = torch.randn(301, 24, generator=generator).to(dtype)
    labels, weights = torch.randint(301, (tokens,), generator=generator), torch.rand(tokens, generator=generator)
    labels[0] = (hidden[0] @ weight.T).argmax()
    whole, whole_correct = cross_entropy(hidden @ weight.T, labels, weights)
    parts, correct = cross_entropy_of_head(hidden, weight, labels, weights)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(correct, whole_correct, rtol=1e-5, atol=1e-6)
    assert not correct.requires_grad
    (expected,) = torch.autograd.grad(whole * 3, hidden)
    near(torch.autograd.grad(parts * 3, hidden)[0], expected.float(), dtype)
    with torch.no_grad():
        assert cross_entropy_of_head(hidden, weight, labels, weights)[0] == parts


def test_a_loss_of_a_head_in_parts_is_the_loss_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, found = tiny_model(), random_examples(6), []
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    for head in (None, model.lm_head):
        monkeypatch.setattr(forward, "frozen_head", lambda _, head=head: head)
        loss, correct = loss_and_accuracy(model, model, examples, 20.0, packing=True)
        found.append((loss.detach(), correct, *torch.autograd.grad(loss, weight)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert "forward" not in vars(model.lm_head)


def test_only_a_frozen_plain_head_on_a_gpu_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert frozen_head(model) is None
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert frozen_head(model) is model.lm_head
    model.config.final_logit_softcapping = 30.0
    assert frozen_head(model) is None
    model.config.final_logit_softcapping = None
    model.lm_head.weight.requires_grad_(True)
    assert frozen_head(model) is None
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    assert frozen_head(model) is None
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert frozen_head(model) is None
