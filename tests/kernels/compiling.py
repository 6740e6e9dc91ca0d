"""Compiling Triton kernels for GPUs that are not there, and reading what the binaries use."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class GpuKind:
    """A kind of GPU: its compute capability, and KiB of shared memory per multiprocessor and per program."""

    capability: int
    per_multiprocessor: int
    per_program: int


#: A100; RTX 30 and A10; L4, L40S and RTX 40; H100 and H200; B200; RTX 50.
GPUS = {
    gpu.capability: gpu
    for gpu in (
        GpuKind(80, 164, 163),
        GpuKind(86, 100, 99),
        GpuKind(89, 100, 99),
        GpuKind(90, 228, 227),
        GpuKind(100, 228, 227),
        GpuKind(120, 100, 99),
    )
}


@dataclass(frozen=True)
class Configuration:
    """Everything that decides a kernel's code.

    Attributes:
        kernel: The kernel.
        types: Triton's types of the arguments that are not constants.
        constants: The constexpr arguments.
        multiples: Arguments that are multiples of 16.
        options: Triton's options.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    multiples: frozenset[str]
    options: Mapping[str, int]

    @property
    def name(self) -> str:
        """The kernel and its constants, as a test shows them."""
        values = ",".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}[{values}]"


def configuration(launch, kernel, dtype, in_dtype, types, multiples, **constants) -> Configuration:
    """A launch as the runtime compiles it.

    Args:
        launch: A `plans.Launch`.
        kernel: The kernel.
        dtype: The dtype of the arguments `in_dtype`.
        in_dtype: Pointers to numbers of that dtype.
        types: Types of other arguments; those without one are int32.
        multiples: Arguments that are multiples of 16; names that the kernel lacks are ignored.
        constants: Constants that the launch does not determine; names that the kernel lacks are ignored.
    """
    names = kernel.arg_names
    fixed = {name: value for name, value in {**constants, **launch.constants}.items() if name in names}
    free = [name for name in names if name not in fixed]
    return Configuration(
        kernel,
        {name: NAMES[dtype] if name in in_dtype else types.get(name, "i32") for name in free},
        fixed,
        frozenset(name for name in multiples if name in free),
        dict(launch.options),
    )


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        registers: Per thread.
        spilled: Bytes of stack and of local memory per thread: what did not fit the registers.
        shared: Bytes of shared memory per program.
        texts: The stages of the compilation, such as `ptx`.
    """

    registers: int
    spilled: int
    shared: int
    texts: Mapping[str, str] = field(repr=False)


def compiled(configuration: Configuration, gpu: GpuKind = GPUS[90]) -> Binary:
    """Compiles a configuration."""
    names = configuration.kernel.arg_names
    source = ASTSource(
        fn=configuration.kernel,
        signature={name: configuration.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in configuration.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in configuration.multiples},
    )
    built = triton.compile(source, target=GPUTarget("cuda", gpu.capability, 32), options=dict(configuration.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(built.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Binary(used["REG"], used["STACK"] + used["LOCAL"], built.metadata.shared, built.asm)


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
