"""On the real SmolLM2: the tokens of transformers and PEFT, in float32, in one mixed and chunked batch."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramill.serve.engine import Engine, EngineConfig, Request, Sampling
from loramill.serve.model import load_decoder

NEW = 8
SETTINGS = {
    "attention": LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "everything": LoraConfig(
        r=16, target_modules="all-linear", use_rslora=True, rank_pattern={"down_proj": 5}, init_lora_weights=False
    ),
}


@pytest.fixture(scope="module")
def cases(base, tmp_path_factory):
    """Prompts of mixed lengths by version, and what transformers and PEFT answer: (version, prompt, tokens)."""
    root = tmp_path_factory.mktemp("smollm2-adapters")
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    story = "The history of the steam engine begins with a simple observation: heated water expands. "
    prompts = [story * 8, "The capital of France is", "Hello", "1, 2, 3, 4,"]
    found = []
    for seed, version in enumerate([None, *SETTINGS]):
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
        if version is not None:
            torch.manual_seed(seed)
            tuned = get_peft_model(model, SETTINGS[version])
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.data.mul_(2.0)
            tuned.save_pretrained(root / version)
            model = PeftModel.from_pretrained(tuned.unload(), root / version).eval()
        for text in prompts[: 4 if version is None else 2]:
            ids = tokenizer(text, return_tensors="pt").input_ids
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            found.append((version, tuple(ids[0].tolist()), tuple(out[0, ids.shape[1] :].tolist())))
    return root, found


@pytest.mark.parametrize("budget", [512, 48])
def test_a_mixed_batch_answers_as_transformers_and_peft(base, cases, budget):
    root, found = cases
    decoder = load_decoder(base.folder, dtype=torch.float32)
    engine = Engine(decoder, lambda version: root / version, EngineConfig(max_batch_tokens=budget, kv_tokens=2048))
    assert budget == 512 or any(len(prompt) > budget for _, prompt, _ in found)
    for i, (version, prompt, _) in enumerate(found):
        engine.submit(Request(str(i), str(version), prompt, Sampling(max_tokens=NEW), version))
    got: list[tuple[int, ...]] = [()] * len(found)
    open_ = len(found)
    while open_:
        assert engine.wait(60)
        for output in engine.step():
            assert output.error is None
            got[int(output.request)] += output.tokens
            open_ -= output.finish is not None
    engine.check_integrity()
    engine.close()
    assert got == [tokens for _, _, tokens in found]
    assert len({tokens for version, prompt, tokens in found if prompt == found[0][1]}) == 3
