"""The norms that DoRA's gains are computed from."""

import pytest
import torch

from loramill.serve.model import load_decoder
from loramill.serve.model.norms import MergedNorms

from .graphed import write_base


def test_norms_in_chunks_are_those_of_the_whole_weight():
    weight, a, b = torch.randn(23, 8), torch.randn(3, 8), torch.randn(23, 3)
    norms = MergedNorms(torch.device("cpu"))
    whole = norms(weight.__getitem__, a, b, 0.7)
    torch.testing.assert_close(whole, (weight + 0.7 * b @ a).norm(dim=1))
    norms._chunk_bytes = 4 * 8 * 5
    sizes = []
    parts = norms(lambda rows: (sizes.append(len(rows)), weight[rows])[1], a, b, 0.7)
    assert sizes == [5, 5, 5, 5, 3]
    torch.testing.assert_close(parts, whole)


@pytest.mark.gpu
def test_on_a_gpu_norms_are_those_of_the_cpu_and_wait_for_no_step(tmp_path):
    on_gpu, on_cpu = (load_decoder(write_base(tmp_path), dtype=torch.bfloat16, device=d) for d in ("cuda", "cpu"))
    module = "model.layers.1.self_attn.k_proj"
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    expected = on_cpu.merged_norms(module, a, b, 0.5)
    on_gpu.merged_norms(module, a, b, 0.5)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    running = torch.cuda.Event()
    running.record()
    got = on_gpu.merged_norms(module, a, b, 0.5)
    assert not running.query()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
