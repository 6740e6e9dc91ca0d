"""The decoder against transformers, architecture by architecture, in float32."""

import pytest
import torch
from peft import LoraConfig
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from loramill.kernels import Batch, Delta, backend
from loramill.serve.model import Chunk, load_decoder

from .models import SMALL, assert_adapts_as_peft, assert_computes_as, last_logits, random_model, run, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 19}
MOE = {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 7, "num_experts_per_tok": 3}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama tied, biased": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama of odd heads": LlamaConfig(**{**SMALL, "num_key_value_heads": 4}, head_dim=20),
    "llama linear rope": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama 3.1 rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama dynamic rope": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "yarn": LlamaConfig(**SMALL, rope_parameters=YARN),
    "yarn, its own factor": LlamaConfig(**SMALL, rope_parameters=YARN | {"attention_factor": 0.7}),
    "yarn of deepseek": LlamaConfig(**SMALL, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn, whole channels": Qwen2Config(**SMALL, rope_parameters=YARN | {"truncate": False, "beta_fast": 4}),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral, window beyond the context": MistralConfig(**SMALL, sliding_window=256),
    "mistral, window": MistralConfig(**SMALL, sliding_window=19),
    "mistral, window of one": MistralConfig(**SMALL, sliding_window=1),
    "qwen2, window from layer 1 on": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3, window by layer": Qwen3Config(
        **SMALL,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=33,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "qwen3 biased": Qwen3Config(**SMALL, head_dim=16, attention_bias=True, rope_parameters={"rope_theta": 1e6}),
    "gemma2": Gemma2Config(**SMALL, **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2 without caps": Gemma2Config(
        **SMALL, **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False
    ),
    "gemma3": Gemma3TextConfig(**SMALL, **GEMMA, sliding_window_pattern=2),
    "gemma3, linear rope": Gemma3TextConfig(
        **SMALL,
        **GEMMA,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        final_logit_softcapping=5.0,
    ),
    "qwen3 moe": Qwen3MoeConfig(**SMALL, **MOE, norm_topk_prob=True),
    "qwen3 moe, some layers dense": Qwen3MoeConfig(
        **SMALL | {"num_hidden_layers": 4}, **MOE, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = random_model(CONFIGS[name], tmp_path)
    assert_computes_as(model, load_decoder(tmp_path, dtype=torch.float32))


ADAPTERS = [
    LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    LoraConfig(r=3, lora_alpha=2, target_modules=["lm_head", "down_proj"], init_lora_weights=False),
    LoraConfig(r=5, target_modules="all-linear", init_lora_weights=False),
    LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], use_rslora=True, init_lora_weights=False),
    LoraConfig(r=4, target_modules=["lm_head", "o_proj"], use_dora=True, init_lora_weights=False),
    LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False),
]


# For a mixture of experts, PEFT takes the names of an MLP's linears for those of the experts.
FAMILIES = [
    LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False),
    LoraConfig(r=3, target_modules=["v_proj", "o_proj"], use_dora=True, init_lora_weights=False),
]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_embedding_head_and_layers_do_what_they_do_in_peft(tied, bits, tmp_path):
    random_model(LlamaConfig(**SMALL, tie_word_embeddings=tied), tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", dtype=torch.float32)
    if bits == 8 and backend().name.startswith("cpu"):
        decoder = load_decoder(tmp_path / "base", dtype=torch.bfloat16)
    assert_adapts_as_peft(tmp_path / "base", decoder, tmp_path, ADAPTERS, bits)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3 moe", "qwen3 moe, some layers dense"])
def test_adapters_of_other_families_do_what_they_do_in_peft(name, tmp_path):
    random_model(CONFIGS[name], tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", dtype=torch.float32)
    of_layers = [module for site in decoder.sites if not site.lookup and not site.head for module in site.modules]
    linears = [module for module in of_layers if "self_attn" in module or "moe" not in name]
    whole = LoraConfig(r=5, target_modules=linears, init_lora_weights=False)
    assert_adapts_as_peft(tmp_path / "base", decoder, tmp_path, [whole, *FAMILIES])


def test_a_mixture_of_experts_is_captured_only_with_one_kernel_for_its_experts(tmp_path, monkeypatch):
    for name in ("llama", "qwen3 moe"):
        random_model(CONFIGS[name], tmp_path / name)
    llama, mixture = (load_decoder(tmp_path / name, dtype=torch.float32) for name in ("llama", "qwen3 moe"))
    assert llama.capturable
    assert not mixture.capturable
    monkeypatch.setattr("loramill.serve.model.decoder.has_grouped_kernel", lambda *_: True)
    assert mixture.capturable


def test_a_head_that_no_adapter_targets_costs_nothing_more(tmp_path, monkeypatch):
    random_model(CONFIGS["llama"], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    slab = decoder.new_slab(1, 1 << 20)
    packed = slab.pack({"model.layers.0.self_attn.q_proj": Delta(torch.ones(2, 48), torch.ones(48, 2))})
    slot = slab.allocate(packed.bytes)
    slab.load(slot, packed)
    batches = []
    ops = type(backend())
    if ops.__name__ == "module":
        pytest.skip("a backend that is a module can't be watched")
    adapted = ops.adapted_linear

    def watch(self, x, weight, view, batch):
        if view.site.modules == ("lm_head",):
            batches.append(batch)
        return adapted(self, x, weight, view, batch)

    monkeypatch.setattr(ops, "adapted_linear", watch)
    cache = decoder.new_cache(blocks=4, block_size=16)
    run(decoder, cache, Chunk(tokens(9, 1), 0, [0, 1], logits_to_keep=3), slab=slab, slots=[slot])
    assert batches == [Batch(3, ())]


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "qwen3 moe"])
def test_sharded_checkpoints_and_other_dtypes_load(name, tmp_path):
    model = random_model(CONFIGS[name], tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    prompt = tokens(30, 1)
    exact = last_logits(model, prompt)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        decoder = load_decoder(tmp_path, dtype=dtype)
        cache = decoder.new_cache(blocks=4, block_size=16)
        got = run(decoder, cache, Chunk(prompt, 0, [0, 1, 2, 3], logits_to_keep=1))[0]
        assert got.dtype == torch.float32
        assert (got - exact).norm() < tolerance * exact.norm()


def test_no_row_is_computed_beyond_those_requested(tmp_path):
    random_model(CONFIGS["llama"], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    cache = decoder.new_cache(blocks=4, block_size=16)
    assert run(decoder, cache, Chunk(tokens(9, 1), 0, [0, 1], logits_to_keep=0)).shape == (0, 97)


def test_a_block_keeps_nothing_of_its_last_owner(tmp_path):
    # NaN after a sequence's end would pass a mask, which multiplies it by zero.
    random_model(CONFIGS["llama"], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    cache = decoder.new_cache(blocks=8, block_size=16)
    for layer in cache:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    short, long = tokens(8, 1), tokens(40, 2)
    run(decoder, cache, Chunk(short[:7], 0, [1, 2], logits_to_keep=0), Chunk(long[:39], 0, [3, 4, 5], logits_to_keep=0))
    logits = run(
        decoder, cache, Chunk(short[7:], 7, [1, 2], logits_to_keep=1), Chunk(long[39:], 39, [3, 4, 5], logits_to_keep=1)
    )
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen3 moe"])
def test_in_bfloat16_a_sequence_has_the_same_bits_in_any_batch(name, tmp_path):
    random_model(CONFIGS[name], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
    if not backend().name.startswith("cpu"):
        pytest.skip("plain torch sums in another order for other numbers of rows")
    prompt, other = tokens(40, 1), tokens(55, 2)
    cache = decoder.new_cache(blocks=12, block_size=16)
    alone = run(decoder, cache, Chunk(prompt, 0, [0, 1, 2], logits_to_keep=1))
    run(
        decoder,
        cache,
        Chunk(prompt[:11], 0, [3, 4, 5], logits_to_keep=0),
        Chunk(other[:54], 0, [6, 7, 8, 9], logits_to_keep=1),
    )
    run(
        decoder,
        cache,
        Chunk(other[54:], 54, [6, 7, 8, 9], logits_to_keep=1),
        Chunk(prompt[11:39], 11, [3, 4, 5], logits_to_keep=0),
    )
    cut = run(decoder, cache, Chunk(prompt[39:], 39, [3, 4, 5], logits_to_keep=1))
    assert torch.equal(cut, alone)
