"""The memory of jobs that share a session: what each adds, what a pass takes, and how many fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import DoesNotFit, InvalidRequest
from loramill.sizing import ADJUSTABLE, GpuPool, SizingRequest, anatomy, plan
from loramill.sizing.memory import MemoryEstimate, estimate
from loramill.sizing.passes import Device, largest_row
from loramill.sizing.session_plan import plan_session
from loramill.sizing.targets import trained_elements
from loramill.sizing.tenants import SessionJob, estimate_session, largest_pass
from loramill.types import TARGETS, JobSpec

BASE = anatomy(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
)


def spec_of(**options: Any) -> JobSpec:
    values = {"base": "0" * 64, "adapter": "a/b", "train": "t", "steps": 2, "batch_size": 1, "micro_tokens": 512}
    return JobSpec.model_validate(values | options)


def job(length: int = 64, **options: Any) -> SessionJob:
    spec = spec_of(**options)
    row = largest_row(spec, [length], 0.5, shared_prefixes=False)
    return SessionJob(spec, trained_elements(spec, BASE), row)


def sizes(found: MemoryEstimate) -> dict[str, int]:
    return {item.name: item.bytes for item in found.items}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 64, "targets": ("q_proj", "v_proj")},
        {"batch_size": 16, "micro_tokens": 128},
        {"gradient_checkpointing": True},
        {"method": "dora"},
        {"method": "pissa", "layers": (3, 4)},
        {"method": "adalora", "packing": False},
    ],
    ids=str,
)
def test_one_job_takes_what_it_takes_alone(options: dict[str, Any], device: Device) -> None:
    alone = job(**options)
    needed = estimate(alone.spec, BASE, "none", alone.row, device).bytes
    assert estimate_session([alone], BASE, "none", device).bytes == pytest.approx(needed, rel=0.01)


def test_one_more_job_adds_its_adapter_and_its_states_to_a_full_pass() -> None:
    jobs = [job(rank=8) for _ in range(8)]  # 8 x 64 tokens fill the pass
    eight, nine = (sizes(estimate_session([*jobs, *more], BASE, "none", "cpu")) for more in ([], [job(rank=8)]))
    weights = jobs[0].trained.weights
    added = {name: nine[name] - eight[name] for name in nine if nine[name] != eight[name]}
    assert added == {"adapters": 4 * weights, "optimizer": 8 * weights}


def test_jobs_that_accumulate_keep_their_gradients_and_casts() -> None:
    jobs = [job(rank=8, batch_size=16, micro_tokens=64) for _ in range(3)]
    trained = jobs[0].trained
    found = sizes(estimate_session(jobs, BASE, "none", "cuda"))
    assert (found["gradients"], found["casts"]) == (3 * 4 * trained.gradients, 3 * 2 * trained.cast)
    single = sizes(estimate_session([job(rank=8, batch_size=1, micro_tokens=64)] * 3, BASE, "none", "cuda"))
    assert (single["gradients"], single["casts"]) == (4 * trained.gradients, 2 * trained.cast)
    recomputing = [replace(each, spec=each.spec.model_copy(update={"gradient_checkpointing": True})) for each in jobs]
    assert "casts" not in sizes(estimate_session(recomputing, BASE, "none", "cuda"))
    assert "casts" not in sizes(estimate_session(jobs, BASE, "none", "cpu"))  # its kernels round what they read


def test_the_pass_grows_with_its_tokens_and_not_with_its_jobs() -> None:
    one = sizes(estimate_session([job(512)], BASE, "none", "cpu"))
    eight = sizes(estimate_session([job(64)] * 8, BASE, "none", "cpu"))
    # Shorter rows attend to fewer tokens; the rest is equal, but for the casts and h of eight adapters.
    assert 0.6 * one["activations"] < eight["activations"] < one["activations"]
    assert eight["logits"] == one["logits"]


def test_inputs_exist_once_for_all_adapters_that_take_them() -> None:
    few, many = job(rank=4, targets=("q_proj",)), job(rank=4, targets=TARGETS)
    of = {
        name: sizes(estimate_session(jobs, BASE, "none", "cuda"))["activations"]
        for name, jobs in {
            "few": [few, few],
            "many": [many, many],
            "both": [few, many],
        }.items()
    }
    # The rows of `few` keep the inputs that `many` needs, since x is one tensor; only their own h is smaller.
    own = 2 * few.row.tokens * (many.trained.saved - few.trained.saved)
    shared = 2 * few.row.tokens * sum(each[2] for each in many.trained.inputs - few.trained.inputs)
    assert of["few"] < of["both"] < of["many"]
    assert of["many"] - of["both"] == own - shared


@pytest.mark.parametrize(
    ("lengths", "pass_tokens", "chosen"),
    [
        ([64] * 4, 256, [0, 1, 2, 3]),
        ([64] * 4, 200, [0, 1, 2]),
        ([300, 64, 100], 200, [0]),
        ([10, 200, 90], 300, [1, 2, 0]),
    ],
)
def test_the_largest_parts_that_fit_share_a_pass(lengths: list[int], pass_tokens: int, chosen: list[int]) -> None:
    assert largest_pass([job(length) for length in lengths], pass_tokens) == chosen


JOBS = st.builds(
    job,
    length=st.sampled_from([16, 64, 200, 600]),
    rank=st.sampled_from([4, 8, 64]),
    method=st.sampled_from(["lora", "dora", "adalora", "pissa"]),
    targets=st.sampled_from([TARGETS, ("q_proj", "v_proj"), ("down_proj",)]),
    batch_size=st.sampled_from([1, 8]),
    gradient_checkpointing=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(jobs=st.lists(JOBS, min_size=1, max_size=6), more=JOBS, device=st.sampled_from(["cpu", "cuda"]))
def test_a_session_takes_less_than_its_jobs_alone_and_a_job_never_lessens_it(
    jobs: list[SessionJob], more: SessionJob, device: Device
) -> None:
    # One that recomputes makes the others of its pass recompute.
    recompute = {"gradient_checkpointing": jobs[0].spec.gradient_checkpointing}
    jobs = [replace(each, spec=each.spec.model_copy(update=recompute)) for each in [*jobs, more]]
    together = estimate_session(jobs, BASE, "none", device)
    alone = sum(estimate(each.spec, BASE, "none", each.row, device).bytes for each in jobs)
    assert together.bytes <= alone * 1.01
    resident = ("base", "adapters", "optimizer")
    fewer = sizes(estimate_session(jobs[:-1], BASE, "none", device))
    assert all(sizes(together)[name] >= fewer[name] for name in resident)


def request(size: int, **options: Any) -> SizingRequest:
    spec = spec_of(max_length=64, **options)
    adjustable = frozenset(ADJUSTABLE) - spec.model_fields_set
    return SizingRequest(spec, BASE, "none", (64,), GpuPool("cpu", size), adjustable, 1.0, shared_prefixes=False)


def test_as_many_fit_as_the_plan_says() -> None:
    found = plan_session(request(4 * 2**30, rank=8), 8)
    assert found.most is not None and found.most > 8
    for tenants, fits in ((found.most, True), (found.most + 1, False)):
        sized = SessionJob(found.job.spec, trained_elements(found.job.spec, BASE), found.job.row)
        assert (estimate_session([sized] * tenants, BASE, "none", "cpu").bytes <= 4 * 2**30) == fits
    assert found.memory.bytes + found.next_bytes == plan_session(request(4 * 2**30, rank=8), 9).memory.bytes
    assert f"{found.most:,} fit" in found.explanation and "One more takes" in found.explanation
    separate = plan(request(4 * 2**30, rank=8)).memory.bytes
    assert found.memory.bytes < 0.35 * 8 * separate


def test_more_than_fit_are_refused_with_the_number_that_fits() -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan_session(request(2 * 2**30, rank=8), 1000)
    [nearest] = refused.value.nearest
    most = int(nearest.removeprefix("tenants = "))
    assert f"{most} fit" in refused.value.message and refused.value.param == "tenants"
    assert plan_session(request(2 * 2**30, rank=8), most).memory.bytes <= 2 * 2**30
    with pytest.raises(DoesNotFit, match="Not one fits"):
        plan_session(request(2**29, rank=8), 2)


def test_without_a_known_device_nothing_is_chosen() -> None:
    found = plan_session(request(0, rank=8), 3)
    assert found.most is None and "fit" not in found.explanation


def test_full_fine_tunings_share_no_session() -> None:
    with pytest.raises(InvalidRequest, match="base of its own") as refused:
        plan_session(request(2**34, method="full"), 2)
    assert refused.value.param == "tenants"
