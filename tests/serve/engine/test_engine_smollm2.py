"""The real SmolLM2: in float32 the same tokens as transformers and PEFT, always; in bfloat16 a bounded KL."""

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramill.kernels import Batch
from loramill.kernels.peft_folder import BaseModules, read_adapter
from loramill.serve.engine import Engine, EngineConfig, Request, SamplingParams
from loramill.serve.model import Chunk, load_decoder

NEW = 8
#: From one token to six hundred, most of them short; the seven longest are of seven versions.
LENGTHS = [1 + i // 3 + round(578 * (i / 63) ** 28) for i in range(64)]
METHODS = {
    "lora": LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "rslora": LoraConfig(
        r=16, target_modules="all-linear", use_rslora=True, rank_pattern={"down_proj": 5}, init_lora_weights=False
    ),
    "dora": LoraConfig(r=8, target_modules=["o_proj", "up_proj"], use_dora=True, init_lora_weights=False),
    "adalora": AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    ),
    "pissa": LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights="pissa_niter_4"),
    "head": LoraConfig(r=4, lora_alpha=4, target_modules=["gate_proj", "lm_head"], init_lora_weights=False),
}
VERSIONS = [None, *METHODS]


def transformer(base, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> dict[str, Path]:
    """An adapter of each method, strong enough to change the answers."""
    root = tmp_path_factory.mktemp("smollm2-adapters")
    for seed, (name, config) in enumerate(METHODS.items()):
        torch.manual_seed(seed)
        adapted = get_peft_model(transformer(base), config)
        convert = {}
        if name == "pissa":
            adapted.save_pretrained(root / "initial")
            convert = {"path_initial_model_for_weight_conversion": str(root / "initial")}
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_E" in parameter_name:
                    parameter.normal_()
                elif "magnitude" in parameter_name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                elif name == "pissa" and "lora_" in parameter_name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
                elif "lora_" in parameter_name:
                    parameter.mul_(2.0)
        adapted.save_pretrained(root / name, save_embedding_layers=False, **convert)
    return {name: root / name for name in METHODS}


@pytest.fixture(scope="module")
def prompts(base) -> list[tuple[str | None, tuple[int, ...]]]:
    """64 prompts from one text, assigned to the versions in turn."""
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    tokens = tokenizer(text).input_ids
    return [(VERSIONS[i % len(VERSIONS)], tuple(tokens[i * 7 : i * 7 + length])) for i, length in enumerate(LENGTHS)]


def answers(decoder, folders, prompts, **config) -> tuple[list[tuple[int, ...]], Engine]:
    engine = Engine(decoder, folders.__getitem__, EngineConfig(**{"kv_tokens": 8192, **config}))
    for i, (version, prompt) in enumerate(prompts):
        engine.submit(Request(str(i), str(version), prompt, SamplingParams(max_tokens=NEW), version))
    got: list[tuple[int, ...]] = [()] * len(prompts)
    open_ = len(prompts)
    while open_:
        assert engine.wait(60)
        for output in engine.step():
            assert output.error is None
            got[int(output.request_id)] += output.tokens
            open_ -= output.finish_reason is not None
    engine.check_integrity()
    engine.close()
    return got, engine


def adapted(base, folders, version, dtype=torch.float32):
    model = transformer(base, dtype)
    return model if version is None else PeftModel.from_pretrained(model, folders[version]).eval()


def test_64_prompts_answer_as_transformers_and_peft_and_in_any_batch(base, folders, prompts):
    assert (min(LENGTHS), max(LENGTHS)) == (1, 600)
    decoder = load_decoder(base.folder, dtype=torch.float32)
    got, engine = answers(decoder, folders, prompts, max_batch_tokens=256)
    assert engine.stats.preemptions == 0
    for version in VERSIONS:
        model = adapted(base, folders, version)
        own = [i for i, (its, _) in enumerate(prompts) if its == version]
        for i in own:
            # The greedy token at each position, after the same tokens before it.
            _, prompt = prompts[i]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + got[i][:-1]]), logits_to_keep=NEW).logits[0]
            assert tuple(logits.argmax(-1).tolist()) == got[i]
        # And literally, for a prompt of medium length.
        ids = torch.tensor([prompts[own[-2]][1]])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tuple(out[0, ids.shape[1] :].tolist()) == got[own[-2]]
    # A shortage of blocks and rows, slots and ranks; the second time the prefixes are cached.
    chosen = [*range(16, 58), *range(16, 24)]
    tight, engine = answers(
        decoder,
        folders,
        [prompts[i] for i in chosen],
        max_batch_tokens=48,
        kv_tokens=320,
        max_sequences=24,
        adapter_slots=3,
        rank_budget=32,
        slot_patience_steps=8,
    )
    assert tight == [got[i] for i in chosen]
    assert engine.stats.preemptions > 0, engine.stats
    again, engine = answers(decoder, folders, [prompts[i] for i in (57, 58, 59, 57, 58, 59)], max_sequences=2)
    assert again == [got[i] for i in (57, 58, 59, 57, 58, 59)]
    # All full blocks of each prompt before its last token, and those of a sequence that was preempted, if one was: that
    # depends on when an adapter is loaded.
    block = EngineConfig().block_size
    assert engine.stats.reused_tokens >= sum((len(prompts[i][1]) - 1) // block * block for i in (57, 58, 59))
    # The same prompt has a different answer under each version.
    story = prompts[44][1]
    outputs, _ = answers(decoder, folders, [(version, story) for version in VERSIONS])
    assert len(set(outputs)) == len(VERSIONS)


@torch.inference_mode()
def test_in_bfloat16_the_kl_to_float32_is_no_worse_than_pefts(base, prompts, tmp_path):
    # As strong as a trained adapter: it moves the base by a KL of about 0.06.
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    random = get_peft_model(transformer(base), config)
    for name, parameter in random.named_parameters():
        if "lora_B" in name:
            parameter.mul_(0.3)
    random.save_pretrained(tmp_path)
    exact, theirs = (
        PeftModel.from_pretrained(transformer(base, dtype), tmp_path).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    decoder = load_decoder(base.folder, dtype=torch.bfloat16)
    slab, cache = decoder.new_slab(1, 64 << 20), decoder.new_cache(64, 16)
    packed = slab.pack(read_adapter(tmp_path, BaseModules.of_sites(decoder.sites, decoder.target_weight)))
    slot = slab.allocate(packed.bytes)
    slab.load(slot, packed)
    kl: dict[str, list[torch.Tensor]] = {"own": [], "theirs": []}
    for _, prompt in prompts[58:62]:
        expected = exact(torch.tensor([prompt])).logits[0].log_softmax(-1)
        chunk = Chunk(prompt, 0, range(64), len(prompt))
        found = {
            "own": decoder.forward([chunk], cache, slab, Batch.of([(slot, len(prompt))])),
            "theirs": theirs(torch.tensor([prompt])).logits[0].float(),
        }
        for side, logits in found.items():
            kl[side].append((expected.exp() * (expected - logits.log_softmax(-1))).sum(-1))
    own, peft = (float(torch.cat(its).mean()) for its in kl.values())
    assert 1e-4 < own <= peft < 1e-2
