"""AdaLoRA's allocation against PEFT's own, and its budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load, load_file

from loramill.data.encoding import EncodedExample
from loramill.errors import AdapterInvalid
from loramill.jobs.train.context import TrainContext
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.loop import train
from loramill.jobs.train.methods import adalora, adapter_files, attach_adapter
from loramill.jobs.train.methods.adalora import initial_rank, rank_budget
from loramill.jobs.train.methods.peft_folder import modules_of, tensor_name
from loramill.models.catalog import Base
from loramill.types import JobSpec

from .method_training import load_model, loss_of, spec_of, store_adapter, tokens, train_steps, trained_model


def singular_values(weights: Any) -> torch.Tensor:
    return torch.stack([weights[tensor_name(module, "lora_E")].detach().flatten() for module in modules_of(weights)])


def test_pruning_equals_that_of_peft(small: Base) -> None:
    """The gradients, importances, pruned triples and penalty are equal, step by step to the end."""
    spec = spec_of(method="adalora", rank=4, init_rank=6, steps=20)
    first, last = int(adalora.PRUNING_BEGIN * 20), int(adalora.PRUNING_END * 20)
    config = AdaLoraConfig(
        init_r=6,
        target_r=4,
        tinit=first,
        tfinal=20 - last,
        deltaT=1,
        total_step=20,
        orth_reg_weight=0.1,  # the authors' own (compute_orth_regu), where PEFT's default is 0.5
        lora_alpha=6.0 / 4 * 6,
        target_modules=list(spec.targets),
        task_type="CAUSAL_LM",
    )
    plain = get_peft_model(load_model(small), config)
    theirs = {n.replace(".default", ""): p for n, p in plain.named_parameters() if p.requires_grad}
    with attach_adapter(load_model(small), spec, small.folder) as adapted:
        ours = {name.removesuffix(".weight"): weight for name, weight in adapted.weights.items()}
        assert ours.keys() == theirs.keys()
        with torch.no_grad():
            for name, weight in ours.items():
                theirs[name].copy_(weight)
        allocator = RankAllocator(plain.base_model.model, config, "default")
        optimizers = [torch.optim.AdamW(weights.values(), lr=1e-2) for weights in (ours, theirs)]
        for step in range(1, 21):
            output = plain(input_ids=tokens(seed=step), labels=tokens(seed=step))
            penalty = adapted.penalty()
            assert penalty is not None
            loss = loss_of(adapted.model, tokens(seed=step)) + penalty
            torch.testing.assert_close(loss, output.loss, rtol=1e-4, atol=1e-5)
            loss.backward()
            output.loss.backward()
            for name, weight in ours.items():
                theirs[name].grad = weight.grad.clone()  # beyond rounding, rankings would part
            for optimizer in optimizers:
                optimizer.step()
            if step < last:
                allocator.update_ipt(plain.base_model.model)
            if step > first:
                allocator.mask_to_budget(plain.base_model.model, allocator.budget_schedule(step)[0])
            adapted.after_step(step)
            for name, weight in ours.items():
                torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-6, msg=f"{step} {name}")
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert (singular_values(adapted.weights) != 0).sum() == 4 * len(modules_of(adapted.weights))


def test_the_mean_rank_at_the_end_is_the_specs(small: Base, tmp_path: Path) -> None:
    spec = spec_of(method="adalora", rank=3, steps=8)
    with trained_model(load_model(small), spec, small.folder) as adapted:
        alive = (singular_values(adapted.weights) != 0).sum(dim=1)
        folder = store_adapter(adapted, spec, tmp_path / "adapter")
    assert alive.float().mean() == 3 and alive.min() < 3 < alive.max()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 6.0 / 3, "readers that do not support patterns need the scale, too"
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = [len(tensors[tensor_name(module, "lora_A.weight")]) for module in modules_of(tensors)]
    assert ranks == [max(1, rank) for rank in alive.tolist()]


def test_a_module_without_a_rank_is_stored_as_zeros(small: Base) -> None:
    spec = spec_of(method="adalora", targets=("q_proj",))
    with attach_adapter(load_model(small), spec, small.folder) as adapted, torch.no_grad():
        for name, weight in adapted.weights.items():
            weight.fill_(0.0 if "lora_E" in name else 1.0)
        files = adapter_files(spec, adapted.weights, adapted.state, "small")
    tensors = load(files["adapter_model.safetensors"])
    assert {len(t) for n, t in tensors.items() if "lora_A" in n} == {1}
    assert not any(t.any() for n, t in tensors.items() if "lora_B" in n)


def test_state_and_weights_suffice_to_resume(small: Base) -> None:
    """A run that stops and resumes from copies of both ends at the same bits (by plain SGD, which has no moments)."""
    spec = spec_of(method="adalora", steps=8)

    def run(adapted: Any, begin: int, end: int) -> None:
        for step in range(begin, end):
            (loss_of(adapted.model, tokens(seed=step)) + adapted.penalty()).backward()
            with torch.no_grad():
                for weight in adapted.weights.values():
                    weight.sub_(weight.grad, alpha=0.3)
            adapted.after_step(step + 1)
            for weight in adapted.weights.values():
                weight.grad = None

    with attach_adapter(load_model(small), spec, small.folder) as uninterrupted:
        run(uninterrupted, 0, 8)
    with attach_adapter(load_model(small), spec, small.folder) as first:
        run(first, 0, 3)
    with attach_adapter(load_model(small), spec.model_copy(update={"seed": 7}), small.folder) as rest, torch.no_grad():
        for mine, theirs in ((rest.weights, first.weights), (rest.state, first.state)):
            assert mine.keys() == theirs.keys()
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        with torch.enable_grad():
            run(rest, 3, 8)
    assert all(torch.equal(weight, uninterrupted.weights[name]) for name, weight in rest.weights.items())


@given(steps=st.integers(1, 500), rank=st.integers(1, 64), more=st.integers(0, 64))
def test_the_rank_budget_never_rises(steps: int, rank: int, more: int) -> None:
    spec = spec_of(steps=steps, rank=rank, init_rank=rank + more)
    ranks = [rank_budget(spec, step) for step in range(steps + 1)]
    assert ranks[0] == rank + more and ranks[-1] == rank
    assert ranks == sorted(ranks, reverse=True)


def test_the_initial_rank_has_a_default(small: Base) -> None:
    assert [initial_rank(spec_of(rank=rank)) for rank in (1, 4, 5)] == [2, 6, 8]
    assert initial_rank(spec_of(rank=4, init_rank=4)) == 4


@pytest.mark.parametrize(
    ("param", "changes"),
    [("init_rank", {"rank": 8, "init_rank": 7}), ("rank_pattern", {"rank_pattern": {"q_proj": 2}})],
)
def test_meaningless_ranks_are_refused(small: Base, param: str, changes: dict[str, Any]) -> None:
    model = load_model(small)
    with (
        pytest.raises(AdapterInvalid) as refused,
        attach_adapter(model, spec_of(method="adalora", **changes), small.folder),
    ):
        pass
    assert refused.value.param == param


def test_the_last_steps_train_the_final_ranks(small: Base) -> None:
    spec: JobSpec = spec_of(method="adalora", steps=10)
    with attach_adapter(load_model(small), spec, small.folder) as adapted:
        assert adapted.best_from_step == 6
        train_steps(adapted, spec, steps=2)
        assert (singular_values(adapted.weights) != 0).float().sum(dim=1).mean() > 4
        train_steps(adapted, spec, steps=6, begin=2)
        dead, state = singular_values(adapted.weights) == 0, [tensor.clone() for tensor in adapted.state.values()]
        assert (~dead).float().sum(dim=1).mean() == 4
        train_steps(adapted, spec, begin=6)
        assert torch.equal(singular_values(adapted.weights) == 0, dead)
        assert all(map(torch.equal, adapted.state.values(), state))


def test_unpruned_weights_never_become_the_version(small: Base, tmp_path: Path) -> None:
    """Nor do they end a job early, however bad their validation losses."""
    spec = spec_of(method="adalora", steps=10, eval_every=1, patience=1, learning_rate=0.5)
    examples = [EncodedExample(tuple(row), 6) for row in tokens(rows=4).tolist()]
    context = TrainContext(
        spec=spec,
        train_examples=examples,
        valid_examples=examples,
        base_folder=small.folder,
        checkpoints=tmp_path / "job",
    )
    points = list(train(load_model(small), context))
    assert next(point.step for point in points if point.is_best) == 6
    assert len(points) >= 7
    tensors = load(export_adapter(tmp_path / "job", spec, base="small")["adapter_model.safetensors"])
    assert sum(len(tensor) for name, tensor in tensors.items() if "lora_A" in name) <= 4 * 21 + 21
