"""The comparison with vLLM's and SGLang's operators, on packages that are laid out like theirs and compute by torch.

The tests show that the arguments fit the interfaces that `rivals` describes, not that the real packages have these.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is available only for Linux")

from loramill.kernels.adapters.packing import Site
from loramill_bench.gpu import criteria
from loramill_bench.gpu.stages import checks
from loramill_bench.kernels import cuda, on_cuda, rivals

SITES = (
    Site(48, ("o",), (40,)),
    Site(32, ("gate", "up"), (24, 24)),
    Site(32, ("q", "k", "v"), (32, 8, 8)),
)
#: One row per adapter, and runs of more than one chunk.
CASES = (cuda.Case(3, 3, 4), cuda.Case(80, 2, 8))

SGLANG = {
    "srt/lora/utils.py": """
from dataclasses import dataclass
from typing import Any

@dataclass
class LoRABatchInfo:
    use_cuda_graph: bool
    bs: int
    num_segments: int
    seg_indptr: Any
    weight_indices: Any
    lora_ranks: Any
    scalings: Any
    max_len: int
    seg_lens: Any
    permutation: Any
""",
    "computed.py": """
import torch

def segments(info, count):
    for segment in range(count):
        start, end = info.seg_indptr[segment : segment + 2].tolist()
        assert 0 < end - start <= info.max_len
        assert info.seg_lens is None or info.seg_lens[segment] == end - start
        adapter = info.weight_indices[segment].item()
        yield info.permutation[start:end].long(), adapter, info.lora_ranks[adapter].item()

def shrink(x, weights, info, stack, count):
    h = torch.full((len(x), weights.shape[1]), torch.nan)
    for rows, adapter, rank in segments(info, count):
        h[rows, : stack * rank] = x[rows] @ weights[adapter, : stack * rank].T
    return h

def expand(h, weights, info, columns, y, count):
    for rows, adapter, rank in segments(info, count):
        for index, (start, end) in enumerate(zip(columns[:-1], columns[1:])):
            b = weights[adapter, start:end, :rank]
            y[rows, start:end] += info.scalings[adapter] * h[rows, index * rank : (index + 1) * rank] @ b.T
    return y
""",
    "kernels/ops/lora/dense/sgemm_lora_a.py": """
from sglang.computed import shrink

def sgemm_lora_a_fwd(x, weights, batch_info, stack_num=1):
    return shrink(x, weights, batch_info, stack_num, batch_info.bs)
""",
    "kernels/ops/lora/dense/sgemm_lora_b.py": """
from sglang.computed import expand

def sgemm_lora_b_fwd(x, weights, batch_info, base_output=None):
    return expand(x, weights, batch_info, [0, weights.shape[1]], base_output, batch_info.bs)
""",
    "kernels/ops/lora/dense/gate_up_lora_b.py": """
from sglang.computed import expand

def gate_up_lora_b_fwd(x, gate_up_lora_b, batch_info, output_dim, base_output=None):
    return expand(x, gate_up_lora_b, batch_info, [0, output_dim, 2 * output_dim], base_output, batch_info.bs)
""",
    "kernels/ops/lora/dense/qkv_lora_b.py": """
from sglang.computed import expand

def qkv_lora_b_fwd(x, qkv_lora_b, batch_info, output_offset, max_qkv_out_dim, base_output=None, n_slices=3):
    assert output_offset.shape == (4,) and max_qkv_out_dim == output_offset.diff().max()
    return expand(x, qkv_lora_b, batch_info, output_offset.tolist(), base_output, batch_info.bs)
""",
    "kernels/ops/lora/dense/chunked_sgmv_shrink.py": """
import os

from sglang.computed import shrink

def chunked_sgmv_lora_shrink_forward(x, weights, batch_info, num_slices):
    # SGLang's search for compiled kernels ignores the rank.
    assert os.environ["SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE"] == "0"
    # The block of rows, which tl.dot takes.
    assert batch_info.max_len in (16, 32, 64, 128)
    return shrink(x, weights, batch_info, num_slices, batch_info.num_segments)
""",
    "kernels/ops/lora/dense/chunked_sgmv_expand.py": """
from sglang.computed import expand

def chunked_sgmv_lora_expand_forward(
    x, weights, batch_info, slice_offsets, max_slice_size, base_output, slice_offsets_cpu=None
):
    assert max_slice_size == slice_offsets.diff().max() and slice_offsets_cpu.equal(slice_offsets)
    return expand(x, weights, batch_info, slice_offsets.tolist(), base_output, batch_info.num_segments)
""",
}
VLLM = {
    "lora/ops/triton_ops/utils.py": """
_LORA_A_PTR_DICT, _LORA_B_PTR_DICT = {}, {}
""",
    "lora/ops/triton_ops/__init__.py": """
import torch

from vllm.lora.ops.triton_ops.utils import _LORA_A_PTR_DICT, _LORA_B_PTR_DICT

class LoRAKernelMeta:
    @classmethod
    def make(cls, max_loras, max_num_tokens, device):
        return cls()

    def prepare_tensors(self, token_lora_mapping):
        self.owner = token_lora_mapping

    def meta_args(self, token_nums, specialize_active_lora):
        return self.owner[:token_nums], specialize_active_lora

def lora_shrink(inputs, lora_a_weights, output_tensor, owner, specialized, scaling):
    # vLLM caches by address, and allocators use addresses again; one key for all sites stands for that.
    lora_a_weights = _LORA_A_PTR_DICT.setdefault("a", lora_a_weights)
    for a, h in zip(lora_a_weights, output_tensor):
        h.copy_(scaling * torch.einsum("nk,nrk->nr", inputs, a[owner]))

def lora_expand(inputs, lora_b_weights, output_tensor, owner, specialized, offset_start=0, add_inputs=False):
    lora_b_weights = _LORA_B_PTR_DICT.setdefault("b", lora_b_weights)
    for b, h in zip(lora_b_weights, inputs):
        part = output_tensor[:, offset_start : offset_start + b.shape[1]]
        part.copy_(part * add_inputs + torch.einsum("nr,nwr->nw", h, b[owner]))
        offset_start += b.shape[1]
""",
}
PACKAGES = {"sglang": SGLANG, "vllm": VLLM}


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which both packages are installed."""
    for package, modules in PACKAGES.items():
        for path, source in modules.items():
            file = tmp_path / package / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "top_level.txt").write_text(f"{package}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE", "")  # restored afterwards
    forget()
    yield tmp_path
    forget()


def compared(cases=CASES, sites=SITES) -> list[rivals.Comparison]:
    def time_us(run) -> float:
        return 2.0

    return list(rivals.comparisons(cases, sites, torch.float32, device="cpu", time_us=time_us))


def test_nothing_is_compared_with_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda _: None)
    assert compared() == []
    assert rivals.versions() == []


@pytest.mark.usefixtures("installed")
def test_every_rival_computes_every_step_at_every_kind_of_site() -> None:
    found = compared()
    assert {each.failure for each in found} == {None}
    assert {(each.us, each.ours_us) for each in found} == {(2.0, 2.0)}
    assert [(each.rival, each.site, each.case) for each in found] == [
        (rival, cuda.name(site), case) for case in CASES for site in SITES for rival in rivals.RIVALS
    ]
    assert rivals.versions() == ["sglang 1.2", "vllm 1.2"]


def replaced(folder: Path, path: str, old: str, new: str) -> None:
    file = folder / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


DENSE = "sglang/kernels/ops/lora/dense"


@pytest.mark.parametrize(
    ("path", "old", "new", "failed", "failure"),
    [
        (f"{DENSE}/sgemm_lora_a.py", "sgemm_lora_a_fwd", "sgemm_a", "triton", "AttributeError: module 'sglang"),
        (f"{DENSE}/chunked_sgmv_shrink.py", "num_slices):", "slices):", "csgmv", "TypeError: chunked_sgmv_lora_shr"),
        ("sglang/srt/lora/utils.py", "max_len", "longest", "triton csgmv", "TypeError: LoRABatchInfo.__init__() got"),
        ("sglang/srt/lora/utils.py", "import Any", "import Missing", "triton csgmv", "ImportError: cannot import"),
        (f"{DENSE}/sgemm_lora_b.py", "return", "return base_output  #", "triton", "the result differs from torch's"),
        (
            "vllm/lora/ops/triton_ops/__init__.py", "part * add_inputs +", "", "vLLM's Punica",
            "the result differs from torch's by",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_a_row_with_the_reason(
    installed: Path, path: str, old: str, new: str, failed: str, failure: str
) -> None:
    replaced(installed, path, old, new)
    for each in compared(CASES[:1], SITES[:1]):
        if each.rival.removeprefix("SGLang's ") in failed:
            assert math.isnan(each.us)
            assert each.failure is not None and each.failure.startswith(failure)
            assert each.remark == f" (not compared: {each.failure})"
        else:
            assert (each.us, each.failure, each.remark) == (2.0, None, "")


def test_rows_must_be_at_least_as_fast_as_every_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    case, site = cuda.Case(8, 8, 16), "o 4096 -> 4096"
    found = [
        rivals.Comparison("vLLM's Punica", site, case, 9.0, 6.0, None),
        rivals.Comparison("SGLang's triton", site, case, 5.4, 6.0, None),
        rivals.Comparison("SGLang's csgmv", site, case, math.nan, 6.0, "ImportError: no such module"),
    ]
    monkeypatch.setattr(rivals, "comparisons", lambda cases: found)
    rows = criteria.judge(list(checks.compare_with_rivals()), dry=False)
    assert [(row.case, row.met, row.target_text) for row in rows] == [
        (f"gpu kernels against vLLM's Punica, 8/8/16 {site}", True, ">= 1"),
        (f"gpu kernels against SGLang's triton, 8/8/16 {site}", False, ">= 1"),
        (
            f"gpu kernels against SGLang's csgmv, 8/8/16 {site} (not compared: ImportError: no such module)",
            False,
            ">= 1",
        ),
    ]
    assert rows[1].value == pytest.approx(0.9)

    timing = cuda.Timing(site, case, 7.0, None, None, 5.0, 40.0, 20.0)
    monkeypatch.setattr(cuda, "timings", lambda cases: [timing])
    results = {result.case: (result.value, result.floor) for result in on_cuda.groups()["cuda 8/8/16"]()}
    assert results[f"cuda 8/8/16 {site}: vLLM's Punica"] == (9.0, 5.0)
    assert f"cuda 8/8/16 {site}: SGLang's csgmv (not compared: ImportError: no such module)" in results
