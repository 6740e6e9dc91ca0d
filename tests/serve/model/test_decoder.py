"""The decoder against transformers, architecture by architecture, in float32."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from loramill.kernels import Batch, backend
from loramill.serve.model import Chunk, load_decoder

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama tied, biased": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama of odd heads": LlamaConfig(**{**SMALL, "num_key_value_heads": 4}, head_dim=20),
    "llama linear rope": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama 3.1 rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral, window beyond the context": MistralConfig(**SMALL, sliding_window=256),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "qwen3 biased": Qwen3Config(**SMALL, head_dim=16, attention_bias=True, rope_parameters={"rope_theta": 1e6}),
}


def random_model(config, folder: Path, **options):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, **options)
    return model


def run(decoder, cache, *chunks: Chunk) -> torch.Tensor:
    batch = Batch.of([(None, sum(len(chunk.tokens) for chunk in chunks))])
    return decoder.forward(chunks, cache, decoder.new_slab(1, 1 << 20), batch)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def last_logits(model, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0, -1]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = random_model(CONFIGS[name], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    cache = decoder.new_cache(blocks=24, block_size=16)
    one, two = tokens(100, 1), tokens(21, 2)
    one_blocks, two_blocks = list(range(13, 0, -1)), [20, 14, 22]
    # A whole prompt and the beginning of another; then the other's middle beside a decode; then two decodes.
    first = run(decoder, cache, Chunk(two[:5], 0, two_blocks, wanted=0), Chunk(one[:98], 0, one_blocks, wanted=1))
    second = run(decoder, cache, Chunk(one[98:99], 98, one_blocks, wanted=1), Chunk(two[5:20], 5, two_blocks, wanted=1))
    third = run(decoder, cache, Chunk(one[99:], 99, one_blocks, wanted=1), Chunk(two[20:], 20, two_blocks, wanted=1))
    got = torch.cat((first, second, third))
    expected = [last_logits(model, p) for p in (one[:98], one[:99], two[:20], one, two)]
    torch.testing.assert_close(got, torch.stack(expected), rtol=2e-4, atol=2e-4)


def test_sharded_checkpoints_and_other_dtypes_load(tmp_path):
    model = random_model(CONFIGS["qwen2"], tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    prompt = tokens(30, 1)
    exact = last_logits(model, prompt)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        decoder = load_decoder(tmp_path, dtype=dtype)
        cache = decoder.new_cache(blocks=4, block_size=16)
        got = run(decoder, cache, Chunk(prompt, 0, [0, 1, 2, 3], wanted=1))[0]
        assert got.dtype == torch.float32
        assert (got - exact).norm() < tolerance * exact.norm()


def test_no_row_is_worked_out_beyond_those_wanted(tmp_path):
    random_model(CONFIGS["llama"], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    cache = decoder.new_cache(blocks=4, block_size=16)
    assert run(decoder, cache, Chunk(tokens(9, 1), 0, [0, 1], wanted=0)).shape == (0, 97)


def test_a_block_keeps_nothing_of_its_last_owner(tmp_path):
    # NaN behind a sequence's end would pass a mask: it is multiplied by zero, not left out.
    random_model(CONFIGS["llama"], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    cache = decoder.new_cache(blocks=8, block_size=16)
    for layer in cache:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    short, long = tokens(8, 1), tokens(40, 2)
    run(decoder, cache, Chunk(short[:7], 0, [1, 2], wanted=0), Chunk(long[:39], 0, [3, 4, 5], wanted=0))
    logits = run(decoder, cache, Chunk(short[7:], 7, [1, 2], wanted=1), Chunk(long[39:], 39, [3, 4, 5], wanted=1))
    assert logits.isfinite().all()


def test_in_bfloat16_too_a_sequence_has_the_same_bits_in_any_company(tmp_path):
    random_model(CONFIGS["llama"], tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
    if not backend().name.startswith("cpu"):
        pytest.skip("plain torch sums in another order for other numbers of rows")
    prompt, other = tokens(40, 1), tokens(55, 2)
    cache = decoder.new_cache(blocks=12, block_size=16)
    alone = run(decoder, cache, Chunk(prompt, 0, [0, 1, 2], wanted=1))
    run(
        decoder,
        cache,
        Chunk(prompt[:11], 0, [3, 4, 5], wanted=0),
        Chunk(other[:54], 0, [6, 7, 8, 9], wanted=1),
    )
    run(
        decoder,
        cache,
        Chunk(other[54:], 54, [6, 7, 8, 9], wanted=1),
        Chunk(prompt[11:39], 11, [3, 4, 5], wanted=0),
    )
    cut = run(decoder, cache, Chunk(prompt[39:], 39, [3, 4, 5], wanted=1))
    assert torch.equal(cut, alone)
