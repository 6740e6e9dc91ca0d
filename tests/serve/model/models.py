"""Tiny random models, compared with transformers and PEFT."""

from copy import deepcopy
from itertools import accumulate
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from loramill.kernels import Batch
from loramill.kernels.peft_folder import BaseModules, read_adapter
from loramill.serve.model import Chunk, Model

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def random_model(config, folder: Path, **options):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, **options)
    return model


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def last_logits(model, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0, -1]


def run(model: Model, cache, *chunks: Chunk, slab=None, slots=None) -> torch.Tensor:
    slab = slab or model.new_slab(1, 1 << 20)
    return model.forward(
        chunks, cache, slab, Batch.of(zip(slots or [None] * len(chunks), (len(c.tokens) for c in chunks), strict=True))
    )


def assert_logits_are(got: torch.Tensor, *expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, torch.stack(expected), rtol=2e-4, atol=2e-4)


def assert_computes_as(model, loaded: Model) -> None:
    """A whole prompt and the beginning of another; the other's middle with a decode; then two decodes."""
    cache = loaded.new_cache(blocks=24, block_size=16)
    one, two = tokens(100, 1), tokens(21, 2)
    one_blocks, two_blocks = list(range(13, 0, -1)), [20, 14, 22]
    first = run(
        loaded, cache, Chunk(two[:5], 0, two_blocks, logits_to_keep=0), Chunk(one[:98], 0, one_blocks, logits_to_keep=1)
    )
    second = run(
        loaded,
        cache,
        Chunk(one[98:99], 98, one_blocks, logits_to_keep=1),
        Chunk(two[5:20], 5, two_blocks, logits_to_keep=1),
    )
    third = run(
        loaded,
        cache,
        Chunk(one[99:], 99, one_blocks, logits_to_keep=1),
        Chunk(two[20:], 20, two_blocks, logits_to_keep=1),
    )
    prompts = (one[:98], one[:99], two[:20], one, two)
    assert_logits_are(torch.cat((first, second, third)), *(last_logits(model, prompt) for prompt in prompts))


def assert_adapts_as_peft(folder: Path, loaded: Model, root: Path, configs: list[LoraConfig], bits: int = 16) -> None:
    """Prompts of the base and of each adapter, chunked in one batch, and two greedy tokens of each."""
    slab, slots, models = loaded.new_slab(len(configs), 1 << 22, bits), [None], [base_of(folder)]
    for index, config in enumerate(configs):
        torch.manual_seed(index)
        get_peft_model(base_of(folder), deepcopy(config)).save_pretrained(root / str(index))
        packed = slab.pack(read_adapter(root / str(index), BaseModules.of_sites(loaded.sites, loaded.target_weight)))
        slots.append(slab.allocate(packed.bytes))
        slab.load(slots[-1], packed)
        models.append(PeftModel.from_pretrained(base_of(folder), root / str(index)).eval())
    prompts = [tokens(17 + 8 * index, index) for index in range(len(slots))]
    cache = loaded.new_cache(blocks=5 * len(slots), block_size=16)
    blocks = [list(range(index * 5, index * 5 + 5)) for index in range(len(slots))]
    starts = [0] * len(slots)

    def step(counts: list[int], wanted: list[int]) -> torch.Tensor:
        chunks = [
            Chunk(prompts[i][starts[i] : starts[i] + count], starts[i], blocks[i], wanted[i])
            for i, count in enumerate(counts)
        ]
        for i, count in enumerate(counts):
            starts[i] += count
        return run(loaded, cache, *chunks, slab=slab, slots=slots)

    step([11] * len(slots), [0] * len(slots))
    # The last two logits of every second prompt are wanted.
    wanted = [1 + index % 2 for index in range(len(slots))]
    got = step([len(prompt) - 11 for prompt in prompts], wanted)
    tolerance = 2e-4 if bits == 16 else 0.1
    for _ in range(2):
        expected = [
            last_logits(model, prompt[: len(prompt) - back])
            for model, prompt, count in zip(models, prompts, wanted, strict=True)
            for back in range(count - 1, -1, -1)
        ]
        for row, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert (mine - theirs).norm() < tolerance * theirs.norm(), row
        for prompt, end in zip(prompts, accumulate(wanted), strict=True):
            prompt.append(int(got[end - 1].argmax()))
        wanted = [1] * len(slots)
        got = step([1] * len(slots), wanted)
    alone = [last_logits(models[0], prompt) for prompt in prompts]
    assert all((mine - plain).norm() > 0.05 * plain.norm() for mine, plain in zip(got[1:], alone[1:], strict=True))


def base_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
