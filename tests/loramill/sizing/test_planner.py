"""The memory that a job needs, the options that are chosen so that it fits, and the alternatives of a refusal."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.data.encoding import EncodedExample
from loramill.errors import DoesNotFit, InvalidRequest
from loramill.jobs.train.batching import group_for_passes, pack, pad
from loramill.models.catalog import Base
from loramill.settings import JobSettings
from loramill.sizing import ADJUSTABLE, Anatomy, GpuPool, SizingRequest, anatomy, check_targets, fit_spec, plan
from loramill.sizing.anatomy import ExpertsShape
from loramill.sizing.devices import gpu_bytes, memory_bytes
from loramill.sizing.memory import NF4_BYTES, base_bytes, estimate
from loramill.sizing.passes import Device, MemoryRow, largest_row, logits_of, whole_logits
from loramill.sizing.planner import fastest_fit, nearest_fits, plan_as_is
from loramill.types import JobSpec

GIB = 2**30


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, object]:
    """The parts of a published Llama's config that determine its memory."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
    }


LLAMA_65B = llama(8192, 22016, 80, 64, 64, 32000)
LLAMA_2_70B = llama(8192, 28672, 80, 64, 8, 32000)
LLAMA_3_8B = llama(4096, 14336, 32, 32, 8, 128256)
SMALL = llama(64, 160, 4, 4, 2, 500)


def spec(**fields: object) -> JobSpec:
    return JobSpec.model_validate(
        {"base": "0" * 64, "adapter": "a/b", "train": "t", "steps": 10, "batch_size": 8, "max_length": 512} | fields
    )


def sizing_request(
    config: dict[str, object], quantization: str, gpu: str, job: JobSpec, sharers: int = 1
) -> SizingRequest:
    return SizingRequest(
        spec=job,
        base=anatomy(config),
        quantization=quantization,
        lengths=(job.max_length,),
        pool=GpuPool("cuda", gpu_bytes(gpu), sharers),
        adjustable=frozenset(ADJUSTABLE) - job.model_fields_set,
    )


def test_65b_in_nf4_at_rank_64_fits_48_gb() -> None:
    found = plan(sizing_request(LLAMA_65B, "nf4", "48GB", spec(rank=64)))
    assert found.memory.bytes <= 48 * GIB
    assert found.spec.gradient_checkpointing


def test_65b_in_bf16_does_not_fit_48_gb_and_nf4_is_named() -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan(sizing_request(LLAMA_65B, "none", "48GB", spec(rank=64)))
    assert any("nf4" in words for words in refused.value.nearest)
    request = sizing_request(LLAMA_65B, "none", "48GB", spec(rank=64))
    mixture = replace(request, base=replace(request.base, experts=ExpertsShape(1, 1, 1, 1, 1)))
    with pytest.raises(DoesNotFit) as refused:
        plan(mixture)
    assert not any("nf4" in words for words in refused.value.nearest)


def test_70b_in_nf4_does_not_fit_24_gb() -> None:
    with pytest.raises(DoesNotFit, match="the largest part is the base"):
        plan(sizing_request(LLAMA_2_70B, "nf4", "24GB", spec(rank=1, max_length=8)))


def test_8b_in_nf4_at_rank_16_and_2048_tokens_fits_24_gb() -> None:
    found = plan(sizing_request(LLAMA_3_8B, "nf4", "24GB", spec(rank=16, max_length=2048)))
    assert found.row.tokens >= 2048
    assert found.memory.bytes <= 24 * GIB


def test_8b_in_nf4_at_rank_32_and_31000_supervised_tokens_fits_22_gib() -> None:
    job = spec(rank=32, max_length=31_000, batch_size=1, micro_tokens=1, gradient_checkpointing=True)
    assert plan(sizing_request(LLAMA_3_8B, "nf4", "l4", job)).memory.bytes <= 22 * GIB


def test_full_fine_tuning_of_8b_fits_80_gb_by_offload_alone() -> None:
    found = plan(sizing_request(LLAMA_3_8B, "none", "80GB", spec(method="full")))
    assert found.spec.offload != "none"
    assert found.memory.host_bytes > 12 * found.memory.items[1].bytes / 2
    with pytest.raises(DoesNotFit) as refused:
        plan(sizing_request(LLAMA_3_8B, "none", "80GB", spec(method="full", offload="none")))
    assert any("offload" in words for words in refused.value.nearest)


def test_given_options_stay_and_the_others_are_chosen() -> None:
    job = spec(max_length=2048, gradient_checkpointing=False, micro_tokens=4096)
    with pytest.raises(DoesNotFit) as refused:
        plan(sizing_request(LLAMA_3_8B, "nf4", "12GB", job))
    assert "gradient_checkpointing = true" in " ".join(refused.value.nearest)
    assert plan(sizing_request(LLAMA_3_8B, "nf4", "12GB", spec(max_length=2048))).spec.gradient_checkpointing


def test_a_job_must_fit_into_its_share_of_a_gpu() -> None:
    whole = plan(sizing_request(LLAMA_3_8B, "nf4", "80GB", spec()))
    half = plan(sizing_request(LLAMA_3_8B, "nf4", "80GB", spec(), sharers=2))
    assert half.memory.bytes <= half.pool.device_bytes // 2 < whole.memory.bytes * 2
    assert half.sharers >= 2


def test_passes_are_longer_on_a_gpu_than_on_a_cpu() -> None:
    request = sizing_request(SMALL, "none", "24GB", spec(batch_size=64))
    assert plan(request).spec.micro_tokens > 256
    assert plan(SizingRequest(**{**fields_of(request), "pool": GpuPool("cpu", 24 * GIB)})).spec.micro_tokens == 256


def fields_of(request: SizingRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in SizingRequest.__slots__}


def test_nf4_bytes_are_those_of_bitsandbytes() -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(1024, 2048).bfloat16()
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = [packed, state.absmax, state.state2.absmax]
    assert sum(part.nbytes for part in parts) == NF4_BYTES * weight.numel()


def test_only_a_gpu_keeps_nf4_in_four_bits() -> None:
    base = anatomy(LLAMA_3_8B)
    assert base_bytes(base, "nf4", "cuda") == pytest.approx(6.98e9 * NF4_BYTES + 2 * 1.0506e9, rel=1e-3)
    # The file's pages stay mapped in addition to the rounded values.
    assert base_bytes(base, "nf4", "cpu") == pytest.approx(2 * base.parameters + 2 * 6.98e9, rel=1e-3)
    assert base_bytes(base, "none", "cpu") == base_bytes(base, "int8", "cuda") == 2 * base.parameters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_flash_attention_needs_no_mask(checkpointing: bool) -> None:
    job = spec(gradient_checkpointing=checkpointing)
    row = MemoryRow(tokens=2048, width=1024, supervised_tokens=1, step_tokens=2048, eager=False)
    odd = anatomy(SMALL | {"head_dim": 12})

    def masks(base: Anatomy, device: Device) -> int:
        """Bytes by which the activations grow if twice as many tokens attend to one another."""
        sizes = [
            {item.name: item.bytes for item in estimate(job, base, "none", each, device).items}["activations"]
            for each in (row, replace(row, width=2048))
        ]
        return sizes[1] - sizes[0]

    assert masks(anatomy(SMALL), "cpu") == masks(odd, "cuda") == 2048 * 1024 * 2
    assert masks(anatomy(SMALL), "cuda") == 0


def test_a_gpu_has_512_rows_of_logits_at_a_time_unless_the_head_is_trained() -> None:
    row = MemoryRow(tokens=2048, width=2048, supervised_tokens=2000, step_tokens=2048, eager=False)
    base = anatomy(LLAMA_3_8B)
    assert logits_of(base, row, "cpu", 4).bytes == whole_logits(base, row).bytes == 8 * 2000 * 128256
    assert logits_of(base, row, "cpu").bytes == 4 * 2000 * 128256
    assert logits_of(base, row, "cuda").bytes == 6 * 512 * 128256 + 2 * 2 * 2000 * 4096
    assert logits_of(base, replace(row, supervised_tokens=9), "cuda").bytes == 6 * 9 * 128256 + 2 * 2 * 9 * 4096
    full = plan_as_is(sizing_request(LLAMA_3_8B, "none", "80GB", spec(method="full")), spec(method="full"))
    assert {item.name: item.bytes for item in full.memory.items}["logits"] == whole_logits(base, full.row).bytes


def test_sizing_and_training_agree_on_what_is_computed_how() -> None:
    import torch

    from loramill.jobs.train.ops import attention, loss
    from loramill.kernels.attention import varlen
    from loramill.sizing import passes

    assert (passes.HEAD_ROWS, passes.EAGER_TOKENS) == (loss.HEAD_ROWS, attention.MAX_EAGER_TOKENS)
    for head_dim in range(2, 300, 2):
        base = anatomy(SMALL | {"head_dim": head_dim})
        assert passes.needs_no_mask(base, "cuda", 2) == varlen.is_supported(torch.bfloat16, head_dim, backward=True)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"targets": ("w_pack",)}, "loramill.targets"),
        ({"targets": ("all-linear", "q_proj")}, "loramill.targets"),
        ({"layers": (3, 4)}, "loramill.layers"),
        ({"layers": (-1,)}, "loramill.layers"),
        ({"rank_pattern": {"lm_head": 4}}, "loramill.rank_pattern"),
        ({"rank_pattern": {"layers.3.mlp.up_proj": 4}, "layers": (0,)}, "loramill.rank_pattern"),
        ({"alpha_pattern": {"(": 4.0}}, "loramill.alpha_pattern"),
    ],
)
def test_an_option_that_matches_nothing_is_refused_by_name(
    tmp_path: Path, options: dict[str, object], param: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    base = Base("small", tmp_path, "0" * 64, "LlamaForCausalLM", 8192)
    with pytest.raises(InvalidRequest) as refused:
        check_targets(spec(**options), base)
    assert refused.value.param == param


def test_targets_layers_and_patterns_that_match_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    base = Base("small", tmp_path, "0" * 64, "LlamaForCausalLM", 8192)
    check_targets(spec(targets=("all-linear",), rank_pattern={r"layers\.[01]\.mlp\.up_proj": 4}), base)
    check_targets(spec(targets=("self_attn.q_proj", "up_proj"), layers=(0, 3), alpha_pattern={"up_proj": 1.0}), base)


def test_fit_spec_changes_nothing_if_the_pool_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    base = Base("small", tmp_path, "0" * 64, "LlamaForCausalLM", 8192)
    job = spec()
    assert fit_spec(job, base, [100], JobSettings()) == (job, None)
    chosen, explanation = fit_spec(job, base, [100], JobSettings(device_bytes=4 * GIB))
    assert (chosen, "of 4.29 GB" in (explanation or "")) == (job, True)
    with pytest.raises(DoesNotFit) as refused:
        fit_spec(job.model_copy(update={"rank": 256}), base, [100], JobSettings(device_bytes=GIB // 4))
    assert refused.value.nearest == ()


def test_the_pool_is_known_by_the_size_or_the_kind_of_its_gpus() -> None:
    def pool(**options: object) -> GpuPool | None:
        return GpuPool.from_settings(JobSettings.model_validate(options))

    assert pool() is None and pool(use_gpu=True) is None and pool(use_gpu=True, accelerator_type="Other") is None
    assert pool(use_gpu="auto", device_bytes=GIB) == GpuPool("cpu", GIB), "undecided: the CPU"
    assert pool(use_gpu=True, device_bytes=24 * GIB, per_gpu=3) == GpuPool("cuda", 24 * GIB, 3)
    assert pool(use_gpu=True, device_bytes=24 * GIB, gpu_fraction=0.5) == GpuPool("cuda", 12 * GIB)
    assert pool(use_gpu=True, accelerator_type="L4") == GpuPool("cuda", 22 * GIB)
    a100 = pool(use_gpu=True, accelerator_type="A100")
    assert a100 is not None and a100.device_bytes == round(39.4 * GIB), "Ray's name is also that of the smaller A100"


@pytest.mark.parametrize(
    ("text", "gib"), [("24GB", 23.52), ("48 gib", 47.04), ("h100", 79.1), ("NVIDIA H100", 79.1), ("512MB", 0.49)]
)
def test_gpus_by_size_or_name(text: str, gib: float) -> None:
    assert gpu_bytes(text) == pytest.approx(gib * GIB, rel=1e-3)


@pytest.mark.parametrize("name", ["t4", "NVIDIA V100"])
def test_a_gpu_that_is_too_old_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"compute capability below 8\.0"):
        gpu_bytes(name)


@pytest.mark.parametrize("text", ["", "big", "-3GB", "24TB2"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        memory_bytes(text)


CONFIGS = (SMALL, LLAMA_3_8B, LLAMA_2_70B)


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    return spec(
        method=draw(st.sampled_from(["lora", "dora", "adalora", "pissa", "full"])),
        rank=draw(st.integers(1, 256)),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        batch_size=draw(st.integers(1, 64)),
        max_length=draw(st.integers(8, 4096)),
        packing=draw(st.booleans()),
        **draw(st.dictionaries(st.just("micro_tokens"), st.integers(1, 8192))),
        **draw(st.dictionaries(st.just("gradient_checkpointing"), st.booleans())),
        **draw(st.dictionaries(st.just("offload"), st.sampled_from(["none", "optimizer", "all"]))),
    )


@given(
    jobs(),
    st.sampled_from(CONFIGS),
    st.sampled_from(["none", "int8", "nf4"]),
    st.integers(1, 80),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=40)
def test_a_plan_fits_and_so_do_the_alternatives_of_a_refusal(job, config, quantization, gib, sharers, cpu) -> None:
    pool = GpuPool("cpu", gib * GIB) if cpu else GpuPool("cuda", gib * GIB, sharers)
    request = SizingRequest(
        job, anatomy(config), quantization, (job.max_length,), pool, frozenset(ADJUSTABLE) - job.model_fields_set
    )
    try:
        found = plan(request)
    except DoesNotFit as refused:
        assert fastest_fit(request) is None
        others = nearest_fits(request)
        assert [text for text, _ in others] == list(refused.nearest)
        assert all(plan(changed).memory.bytes <= changed.pool.budget_bytes for _, changed in others)
    else:
        assert found.memory.bytes <= pool.budget_bytes
        assert found.sharers >= pool.sharers
        same = {name: getattr(job, name) for name in job.model_fields_set - {"micro_tokens"}}
        assert {name: getattr(found.spec, name) for name in same} == same


GROWTH = ("rank", "max_length", "micro_tokens", "batch_size", "layers", "hidden", "vocabulary")


@given(jobs(), st.sampled_from(GROWTH), st.integers(1, 500), st.sampled_from(["none", "int8", "nf4"]))
@settings(max_examples=100)
def test_more_of_anything_never_needs_less(job, field, more, quantization) -> None:
    grown, config, larger = job, SMALL, SMALL
    if field == "layers":
        larger = {**SMALL, "num_hidden_layers": 4 + more}
    elif field == "hidden":
        larger = {**SMALL, "hidden_size": 64 + 4 * more}
    elif field == "vocabulary":
        larger = {**SMALL, "vocab_size": 500 + more}
    else:
        grown = job.model_copy(update={field: getattr(job, field) + more})
    assert bytes_of(job, config, quantization) <= bytes_of(grown, larger, quantization)


def bytes_of(job: JobSpec, config: dict[str, object], quantization: str) -> int:
    request = sizing_request(config, quantization, "24GB", job)
    return plan_as_is(request, job).memory.bytes


@given(st.integers(1, 16), st.integers(1, 600), st.booleans(), st.integers(0, 40), st.data())
@settings(max_examples=60)
def test_no_pass_of_a_step_is_larger_than_its_row(size, limit, packing, prefix, data) -> None:
    job = spec(batch_size=size, micro_tokens=limit, packing=packing, max_length=512)
    same = data.draw(st.booleans())
    lengths = [300] * 5 if same else data.draw(st.lists(st.integers(2, 512), min_size=1, max_size=16))
    draw = random.Random(0)
    start = tuple(draw.randrange(1000) for _ in range(prefix))
    examples = [
        EncodedExample((*start, *(draw.randrange(1000) for _ in range(length)))[:length], max(1, length - 2))
        for length in lengths
    ]
    # A step may also take an example twice; the whole example is then the shared prefix.
    row = largest_row(job, lengths, shared_prefixes=prefix > 0 or size > len(lengths))
    for group in group_for_passes([examples[index % len(examples)] for index in range(size)], limit, packing=packing):
        rows = pack(group) if packing else pad(group)
        assert rows.tokens.numel() <= row.tokens
        assert rows.tokens.shape[1] <= row.width
        if same and packing and not prefix and size <= len(lengths):
            assert row.tokens <= -(-limit // 300) * 300


def test_every_item_is_a_whole_number_of_bytes() -> None:
    job = spec()
    needed = estimate(job, anatomy(SMALL), "nf4", largest_row(job, [100]), "cuda")
    assert all(isinstance(item.bytes, int) and item.bytes > 0 for item in needed.items)
    assert needed.tensors == needed.bytes - needed.items[0].bytes
