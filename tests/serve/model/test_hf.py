"""The fallback against transformers and PEFT, architecture by architecture, and what it refuses."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import (
    BertConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    StableLmConfig,
)

from loramill.errors import BaseUnusable, EngineFault
from loramill.kernels import Delta
from loramill.serve.model import Chunk, Decoder, load_model
from loramill.serve.model.hf import load_hf

from .models import SMALL, assert_adapts_as_peft, assert_computes_as, base_of, last_logits, random_model, run, tokens

SIZES = SMALL | {"hidden_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHOLE_HEADS = SIZES | {"num_key_value_heads": 4}
CONFIGS = {
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=19, query_pre_attn_scalar=20, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=19, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": PhiConfig(**WHOLE_HEADS),
    "gpt2": GPT2Config(
        vocab_size=97,
        n_positions=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=64,
        ffn_dim=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        init_std=0.2,
    ),
    "stablelm": StableLmConfig(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "longrope": LlamaConfig(
        **SIZES | {"max_position_embeddings": 4096},
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [3.0] * 8,
            "original_max_position_embeddings": 128,
        },
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, random_model(CONFIGS[request.param], folder), folder, load_hf(folder, dtype=torch.float32)


def test_logits_are_those_of_transformers(case):
    _, model, _, loaded = case
    assert_computes_as(model, loaded)
    assert loaded.vocabulary == 97


def test_adapters_do_what_they_do_in_peft(case, tmp_path):
    name, _, folder, loaded = case
    embedding = {"gpt2": "wte"}.get(name, "embed_tokens")
    linear = {"gpt2": "c_attn", "opt": "fc1", "phi": "dense"}.get(name, "o_proj")
    configs = [
        LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False),
        LoraConfig(r=3, lora_alpha=6, target_modules=[embedding, linear], init_lora_weights=False),
        LoraConfig(r=3, lora_alpha=9, target_modules=["lm_head", linear], use_dora=True, init_lora_weights=False),
    ]
    if name == "gpt2":
        configs.append(LoraConfig(r=2, lora_alpha=6, target_modules=["wpe"], init_lora_weights=False))
    assert_adapts_as_peft(folder, loaded, tmp_path, configs)


def test_contexts_are_those_that_a_mixed_batch_can_have(case):
    name, _, _, loaded = case
    assert loaded.context_length == (128 if name == "longrope" else 256)


def test_only_the_requested_rows_are_returned(case):
    _, model, _, loaded = case
    cache, prompt = loaded.new_cache(blocks=2, block_size=16), tokens(20, 4)
    assert run(loaded, cache, Chunk(prompt[:9], 0, [1, 0], logits_to_keep=0)).shape == (0, 97)
    got = run(loaded, cache, Chunk(prompt[9:], 9, [1, 0], logits_to_keep=11))
    torch.testing.assert_close(got[-1], last_logits(model, prompt), rtol=2e-4, atol=2e-4)
    assert len(got) == 11


def test_int8_adapters_and_bfloat16(tmp_path):
    random_model(CONFIGS["gemma3"], tmp_path / "base")
    loaded = load_hf(tmp_path / "base", dtype=torch.bfloat16)
    configs = [LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)]
    assert_adapts_as_peft(tmp_path / "base", loaded, tmp_path, configs, bits=8)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_linears_except_the_head_are_quantized(kind, tmp_path):
    model = random_model(CONFIGS["gpt2"], tmp_path)
    loaded = load_hf(tmp_path, dtype=torch.float32, quantization=kind)
    weights = {module: loaded.target_weight(module) for site in loaded.sites for module in site.modules}
    for name, module in model.named_modules():
        if name in weights and type(module).__name__ == "Conv1D":
            assert not torch.equal(weights[name], module.weight.T)
            torch.testing.assert_close(weights[name], module.weight.T, rtol=0, atol=0.2)
            module.weight.data = weights[name].T.contiguous()
    assert torch.equal(weights["lm_head"], model.lm_head.weight)
    assert_computes_as(model, loaded)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FalconConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4), "registry"),
        (GptOssConfig(**SIZES, head_dim=16, num_local_experts=4), "sinks"),
        (Llama4TextConfig(**SIZES, head_dim=16, intermediate_size_mlp=56, num_local_experts=2), "chunked_attention"),
        (DeepseekV3Config(**SIZES), "can't be served through transformers"),
        (BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}), "differ from those in one"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_architectures_that_cannot_be_paged_are_refused(config, message, tmp_path):
    random_model(config, tmp_path)
    with pytest.raises(BaseUnusable, match=message):
        load_hf(tmp_path, dtype=torch.float32)


def test_windows_that_the_attention_does_not_get_are_refused(tmp_path):
    # StableLM ignores it: whatever its config contains, each row attends to everything.
    random_model(StableLmConfig(**SIZES, sliding_window=8), tmp_path)
    with pytest.raises(BaseUnusable, match="of its layers have a sliding window"):
        load_hf(tmp_path, dtype=torch.float32)


def test_a_folder_that_is_not_a_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BaseUnusable, match=r"config\.json can't be read"):
        load_model(tmp_path, dtype=torch.float32)
    CONFIGS["opt"].save_pretrained(tmp_path)
    with pytest.raises(BaseUnusable, match="can't be served through transformers"):
        load_model(tmp_path, dtype=torch.float32)


def test_the_decoder_is_used_where_it_can_be(tmp_path, caplog):
    random_model(CONFIGS["llama"], tmp_path / "llama")
    random_model(CohereConfig(**SIZES), tmp_path / "cohere")
    with caplog.at_level(logging.INFO, "loramill"):
        decoder, other = (load_model(tmp_path / name, dtype=torch.float32) for name in ("llama", "cohere"))
    assert isinstance(decoder, Decoder)
    assert_computes_as(base_of(tmp_path / "cohere"), other)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "base loaded by the decoder",
        "base loaded through transformers",
    ]
    assert "architecture CohereForCausalLM" in caplog.records[1].message


def test_rows_that_cannot_be_matched_to_adapters_are_an_error(case):
    loaded = case[3]
    site = next(site for site in loaded.sites if not site.lookup)
    slab = loaded.new_slab(1, 1 << 20)
    packed = slab.pack({site.modules[0]: Delta(torch.ones(1, site.d_in), torch.ones(site.widths[0], 1))})
    slot = slab.allocate(packed.bytes)
    slab.load(slot, packed)
    module = loaded._model.get_submodule(site.modules[0])
    before = module.forward
    # Like an expert, it gets only some of the rows.
    module.forward = lambda x: torch.cat((before(x.flatten(0, -2)[:3]), before(x.flatten(0, -2)[3:]))).view(
        *x.shape[:-1], -1
    )
    try:
        cache, chunk = loaded.new_cache(blocks=1, block_size=16), Chunk(tokens(8, 1), 0, [0], logits_to_keep=1)
        with pytest.raises(EngineFault, match="sees 3 rows in a step of 8"):
            run(loaded, cache, chunk, slab=slab, slots=[slot])
        run(loaded, cache, chunk, slab=slab)
    finally:
        module.forward = before
