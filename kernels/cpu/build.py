"""Compiles the native kernels at first use.

The library is cached under a name derived from the sources, the compiler and its flags, so a change of any of them
makes another file. It is written under a temporary name and renamed, so two processes that compile at once both get a
complete library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from loramill.errors import SetupError

SOURCES = Path(__file__).parent / "source"

_AVX512_FLAGS = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
_AVX512_FEATURES = ("avx2", "fma3", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
#: Compiler flags and required CPU features of each tier, the best first. Only "avx512" multiplies bfloat16 directly.
TIERS = {
    "avx512": (f"{_AVX512_FLAGS} -mavx512bf16", (*_AVX512_FEATURES, "avx512_bf16")),
    "avx512f": (_AVX512_FLAGS, _AVX512_FEATURES),
    "avx2": ("-mavx2 -mfma", ("avx2", "fma3")),
}
_FLAGS = "-O2 -std=c11 -shared -fPIC -pthread"
_SECONDS = 120


def supported_tiers() -> tuple[str, ...]:
    """The tiers that this processor supports by CPUID, the best first."""
    features = torch.cpu.get_capabilities()
    if features["architecture"] != "x86_64":
        return ()
    return tuple(tier for tier, (_, needed) in TIERS.items() if all(features.get(name) for name in needed))


def compiler() -> str | None:
    """The C compiler: the one in CC, else cc, gcc or clang; None if there is none."""
    return next(filter(None, map(shutil.which, [os.environ.get("CC", ""), "cc", "gcc", "clang"])), None)


@functools.cache
def library(tier: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for one tier and one element type, compiled if they are not cached.

    Raises:
        SetupError: There is no compiler, or it can't compile them.
    """
    cc = compiler()
    if cc is None:
        raise SetupError("There is no C compiler for the native kernels; install gcc, or set LORAMILL_KERNELS=torch.")
    flags = (*shlex.split(f"{_FLAGS} {TIERS[tier][0]}"), *(["-DBFLOAT16"] if dtype == torch.bfloat16 else []))
    for folder in _caches():
        path = folder / f"{tier}-{'bf16' if dtype == torch.bfloat16 else 'fp32'}-{_fingerprint(cc, flags)}.so"
        try:
            if not path.exists():
                _make_private(folder)
                _compile(cc, flags, path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            failure = error
    raise SetupError(f"The native kernels can't be stored or loaded ({failure}); make {_caches()[0]} writable.")


def _caches() -> list[Path]:
    """Folders for libraries: the user's cache, then a temporary folder of the user's own."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 (never raises)
    return [base / "loramill" / "kernels", Path(tempfile.gettempdir()) / f"loramill-kernels-{os.getuid()}"]


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user, whose code would be run")


def _fingerprint(cc: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([cc, "--version"], capture_output=True, check=False, timeout=_SECONDS).stdout
    digest = hashlib.sha256(version + " ".join(flags).encode() + platform.machine().encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(cc: str, flags: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        try:
            command = [cc, *flags, *sources, "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SetupError(f"{cc} took more than {_SECONDS} s to compile the native kernels.") from error
        if done.returncode:
            raise SetupError(f"{cc} can't compile the native kernels: {done.stderr.strip()[-2000:]}")
        built.replace(path)
