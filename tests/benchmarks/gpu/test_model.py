"""The performance model's arithmetic: bytes of a known base, and what grows with what."""

from dataclasses import replace

import pytest

from loramill.sizing.anatomy import anatomy, llama_of
from loramill_bench.gpu import model
from loramill_bench.gpu.model import H100, Decode, Pass

LLAMA_3_8B = anatomy(llama_of(8))


def test_bytes_of_llama_3_8b():
    hidden, kv, wide, layers = 4096, 1024, 14336, 32
    linears = layers * (hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * wide)
    assert model.linear_bytes(LLAMA_3_8B) == 2 * linears == 13_958_643_712
    assert model.head_bytes(LLAMA_3_8B) == 2 * 128_256 * hidden
    assert model.kv_bytes(LLAMA_3_8B) == 131_072
    assert model.adapter_bytes(LLAMA_3_8B, 16) == 83_886_080
    step = Decode(32, 1024, 4)
    assert model.decode_bytes(LLAMA_3_8B, step) == (
        13_958_643_712 + 2 * 128_256 * 4096 + 32 * 1024 * 131_072 + 4 * 83_886_080
    )


@pytest.mark.parametrize(
    ("step", "most"), [(Decode(1, 1024, 0), 1.35), (Decode(32, 1024, 32), 1.45), (Decode(128, 512, 32), 1.5)]
)
def test_a_decode_step_takes_more_than_its_bytes_and_less_than_the_target(step, most):
    floor = model.decode_bytes(LLAMA_3_8B, step) / H100.bandwidth
    assert floor < model.decode_seconds(LLAMA_3_8B, step, H100.bandwidth).total < most * floor


def test_the_host_counts_as_far_as_it_takes_longer_than_the_device():
    small = anatomy({**llama_of(8), "num_hidden_layers": 1, "vocab_size": 1000})
    step = Decode(128, 16, 0)
    parts = model.decode_seconds(small, step, H100.bandwidth)
    assert parts.host > 0
    assert parts.total == pytest.approx(model.HOST_STEP + 128 * model.HOST_ROW)
    assert model.decode_seconds(LLAMA_3_8B, step, H100.bandwidth).host == 0


def test_a_long_prompt_is_bound_by_products_and_a_cached_prefix_costs_attention_alone():
    whole = model.prefill_seconds(LLAMA_3_8B, 2048, 0, H100)
    assert whole.linears == pytest.approx(2048 * 13_958_643_712 / (0.62 * 989e12))
    assert whole.linears > whole.total / 2
    behind = model.prefill_seconds(LLAMA_3_8B, 2048, 4096, H100)
    assert replace(behind, attention=whole.attention) == whole
    # 4,096 cached positions for each token, where it saw half of 2,048.
    assert behind.attention == pytest.approx(5 * whole.attention)


def test_training_on_packed_examples_reaches_the_figure_and_recomputes_a_third():
    step = Pass(4096, 512)
    parts = model.training_seconds(LLAMA_3_8B, step)
    assert 4096 / parts.total > 9000
    without = model.training_seconds(LLAMA_3_8B, replace(step, recompute=False))
    assert without.linears == pytest.approx(2 / 3 * parts.linears)
    dense = model.training_seconds(LLAMA_3_8B, replace(step, nf4=False))
    assert dense.linears == pytest.approx(3 * 4096 * 13_958_643_712 / (0.62 * 989e12))
    assert model.training_seconds(LLAMA_3_8B, Pass(4096, 4096)).attention == pytest.approx(8 * parts.attention)


def test_a_short_pass_waits_for_its_launches():
    assert model.training_seconds(LLAMA_3_8B, Pass(64, 64)).host > 0


def test_the_table_has_all_gpus_and_parts_in_milliseconds():
    lines = list(model.table())
    assert [gpu.name for gpu in model.GPUS if not any(line.startswith(f"\n{gpu.name}:") for line in lines)] == []
    assert lines[0].startswith("Llama 8B: linears 13.96 GB, head 1.05 GB, 131 kB per token of KV, 83.9 MB per adapter")
    assert str(model.Parts(linears=0.0049, head=1e-6)) == "linears 4.90 ms"
