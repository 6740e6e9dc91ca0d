"""`grouped_lora` against a PEFT model per tenant."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loramill.kernels.batch import Batch
from loramill.kernels.training import Trainable, dropout_seed, grouped_lora

from .training_oracle import (
    ONE,
    SLOTS,
    THREE,
    TWO,
    assert_near,
    mask,
)


class Masked(nn.Module):
    """PEFT's dropout, with the mask that `grouped_lora` draws."""

    def __init__(self, p, seed):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        return x * mask(self.seed, self.p, x.numel() // x.shape[-1], x.shape[-1]).to(x.dtype).view_as(x)


class Grouped(nn.Module):
    """A linear of a model of several tenants; `step` holds their shared batch."""

    def __init__(self, linear, adapters, step):
        super().__init__()
        self.linear, self.adapters, self.step = linear, adapters, step

    def forward(self, x):
        y = grouped_lora(x.flatten(0, -2), self.linear.weight, self.adapters, self.step["batch"], self.linear.bias)
        return y.unflatten(0, x.shape[:-1])


def tenants_of(base, configs):
    """One PEFT model per tenant, with seeded dropout, and one model for all, on copies of their parameters."""
    together, step = copy.deepcopy(base).requires_grad_(False), {}
    models, pairs, sites = {}, [], {}
    for slot, config in configs.items():
        models[slot] = get_peft_model(copy.deepcopy(base), config).train()
        for name, module in models[slot].base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                seed = dropout_seed(f"tenant-{slot.index}", 7, name)
                module.lora_dropout["default"] = Masked(config.lora_dropout, seed)
                theirs = module.lora_A["default"].weight, module.lora_B["default"].weight
                ours = [weight.detach().clone().requires_grad_() for weight in theirs]
                scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
                sites.setdefault(name, {})[slot] = Trainable(*ours, scale, config.lora_dropout, seed)
                pairs += [(f"{slot.index}:{name}.{n}", o, t) for n, o, t in zip("AB", ours, theirs, strict=True)]
    for name, adapters in sites.items():
        parent, _, leaf = name.rpartition(".")
        setattr(together.get_submodule(parent), leaf, Grouped(together.get_submodule(name), adapters, step))
    return models, together, step, pairs


def assert_like_peft(models, together, step, pairs, inputs, owners, loss):
    """One step of all tenants together against one per tenant; `owners` are the slots of the samples in `inputs`."""
    per_sample = inputs.shape[1]
    step["batch"] = Batch.of((owner, per_sample) for owner in owners)
    out = together(inputs)
    chosen = {slot: [i for i, owner in enumerate(owners) if owner == slot] for slot in models}
    ours = {slot: loss(out, inputs)[chosen[slot]].mean() for slot in models}
    sum(ours.values()).backward()
    for slot, model in models.items():
        alone = inputs[chosen[slot]]
        theirs = loss(model(alone), alone).mean()
        theirs.backward()
        assert_near(ours[slot], theirs, 1e-5, f"loss of {slot.index}")
    assert len(pairs) >= 2 * len(models)
    for name, our, their in pairs:
        assert their.grad.abs().max() > 0
        assert_near(our.grad, their.grad, 1e-5, f"gradient of {name}")


def lora_config(r, p, targets, rslora, **rest):
    # init_lora_weights=False: a random B, as zeros would hide A's gradient.
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        lora_dropout=p,
        target_modules=targets,
        use_rslora=rslora,
        init_lora_weights=False,
        **rest,
    )


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 41), nn.Linear(41, 24, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_those_of_separate_peft_runs_of_linears(p):
    configs = {
        ONE: lora_config(1, p, ["up", "down"], rslora=False),
        TWO: lora_config(256, p, ["up"], rslora=True),
        THREE: lora_config(19, p, ["down"], rslora=False),
        SLOTS[3]: lora_config(64, 0.5, ["up", "down"], rslora=True),
    }
    tenants = tenants_of(Tiny(), configs)
    owners = [ONE, TWO, None, ONE, ONE, THREE, SLOTS[3], TWO, None]
    assert_like_peft(*tenants, torch.randn(9, 5, 24), owners, lambda y, x: (y - x.flip(1)).square().mean((1, 2)))


def next_token_loss(out, ids):
    logits = out.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def test_gradients_are_those_of_separate_peft_runs_of_a_llama():
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 97}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).float()
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = {
        ONE: lora_config(8, 0.1, every, rslora=False, task_type="CAUSAL_LM"),
        TWO: lora_config(33, 0.25, ["q_proj", "v_proj"], rslora=True, task_type="CAUSAL_LM"),
        THREE: lora_config(2, 0.0, every[4:], rslora=False, task_type="CAUSAL_LM"),
    }
    owners = [TWO, ONE, ONE, None, THREE, TWO, ONE]
    assert_like_peft(*tenants_of(base, configs), torch.randint(0, 97, (7, 13)), owners, next_token_loss)
