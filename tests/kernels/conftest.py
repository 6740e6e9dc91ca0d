import pytest
import torch

from loramill.kernels import reference, torch_backend
from loramill.kernels.cpu.build import TIERS, supported_tiers
from loramill.kernels.cpu.native import Native

BACKENDS = {"reference": reference, "torch": torch_backend, **{f"cpu-{tier}": Native(tier) for tier in TIERS}}
NATIVE = [name for name in BACKENDS if name.startswith("cpu")]


def open_backend(name: str):
    if name.startswith("cpu") and name.removeprefix("cpu-") not in supported_tiers():
        pytest.skip(f"this processor has no {name.removeprefix('cpu-')}")
    return BACKENDS[name]


@pytest.fixture(params=BACKENDS)
def ops(request):
    return open_backend(request.param)


@pytest.fixture(params=NATIVE)
def native(request):
    return open_backend(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param
