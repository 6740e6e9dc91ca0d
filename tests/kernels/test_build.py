"""Compiling at first use: the cache, two processes at once, no compiler, an unwritable home, threads."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loramill import kernels
from loramill.errors import SettingsInvalid, SetupError
from loramill.kernels import Batch, Site, torch_backend
from loramill.kernels.cpu import build
from loramill.kernels.cpu.native import Native, open_native

from .oracle import filled_slab, random_delta

pytestmark = pytest.mark.skipif(not build.supported_tiers(), reason="this processor has no AVX2")
#: Compiles without optimization, in half the time.
COMPUTE = """
import torch
from loramill.kernels import backend
from loramill.kernels.cpu import build
build._FLAGS = build._FLAGS.replace("-O2", "-O0")
weight = torch.arange(12.0).view(3, 4).bfloat16()
ops = backend()
print(ops.name, ops.linear(torch.ones(1, 4).bfloat16(), ops.pack(weight)).tolist())
"""
#: The last is the quickest to compile.
TIER = (build.supported_tiers() or (None,))[-1]


@pytest.fixture(autouse=True)
def clear_caches():
    build.library.cache_clear()
    kernels.backend.cache_clear()
    yield
    build.library.cache_clear()
    kernels.backend.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """Compiles without optimization, in half the time."""
    monkeypatch.setattr(build, "_FLAGS", build._FLAGS.replace("-O2", "-O0"))


def compute(**environment):
    return subprocess.run(
        [sys.executable, "-c", COMPUTE], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_two_processes_that_compile_at_once_both_get_a_whole_library(tmp_path):
    def first_use(_):
        return compute(XDG_CACHE_HOME=str(tmp_path), LORAMILL_KERNELS=f"cpu-{TIER}")

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(first_use, range(2)))
    assert [run.stdout for run in done] == [f"cpu-{TIER} [[6.0, 22.0, 38.0]]\n"] * 2, done
    (cached,) = (tmp_path / "loramill" / "kernels").iterdir()
    assert cached.name.startswith(f"{TIER}-bf16-")


def test_the_cache_is_used_and_a_changed_source_is_another_file(tmp_path, monkeypatch, quick):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tier = TIER
    build.library(tier, torch.float32)
    (first,) = (tmp_path / "loramill" / "kernels").iterdir()
    stamp = first.stat().st_mtime_ns
    build.library.cache_clear()
    build.library(tier, torch.float32)
    assert first.stat().st_mtime_ns == stamp
    source = tmp_path / "source"
    source.mkdir()
    for path in build.SOURCES.iterdir():
        (source / path.name).write_text(path.read_text() + "\n// changed\n")
    monkeypatch.setattr(build, "SOURCES", source)
    build.library.cache_clear()
    build.library(tier, torch.float32)
    assert len(list((tmp_path / "loramill" / "kernels").iterdir())) == 2


def test_a_broken_file_in_the_cache_does_no_harm(tmp_path, monkeypatch, quick):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    tier = TIER
    build.library(tier, torch.float32)
    (whole,) = (tmp_path / "cache" / "loramill" / "kernels").iterdir()
    broken = tmp_path / "other"
    broken.write_bytes(b"not a library")
    broken.replace(whole)
    build.library.cache_clear()
    assert build.library(tier, torch.float32).adapted_linear


def test_a_home_that_cannot_be_written_falls_back_to_a_temporary_folder(tmp_path, monkeypatch, quick):
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made below this")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    build.library(TIER, torch.float32)
    (folder,) = tmp_path.glob("loramill-kernels-*")
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.iterdir())) == 1


def test_a_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(build.os, "getuid", lambda: 12345)
    with pytest.raises(SetupError, match="another user"):
        build.library(TIER, torch.float32)


def test_without_a_compiler_torch_computes_and_this_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.delenv("LORAMILL_KERNELS", raising=False)
    assert kernels.backend() is torch_backend
    assert "no C compiler" in caplog.text
    kernels.backend.cache_clear()
    monkeypatch.setenv("LORAMILL_KERNELS", "cpu")
    with pytest.raises(SettingsInvalid, match=r"no C compiler.*install gcc"):
        kernels.backend()


@pytest.mark.parametrize(
    ("name", "device", "instead"), [("cpu", "cuda", "triton"), ("cpu-avx2", "cuda", "torch"), ("triton", "cpu", "cpu")]
)
def test_kernels_of_another_device_are_refused(name, device, instead, monkeypatch):
    kernels.backend.cache_clear()
    monkeypatch.setenv("LORAMILL_KERNELS", name)
    with pytest.raises(SettingsInvalid, match=f"LORAMILL_KERNELS={name} doesn't run on {device}.* {instead}"):
        kernels.backend(device)


def test_without_a_compiler_on_the_path(tmp_path):
    done = compute(PATH=str(tmp_path), CC="", XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "torch [[6.0, 22.0, 38.0]]\n", done.stderr


def test_a_compiler_that_fails_is_reported_with_its_output(tmp_path, monkeypatch):
    liar = tmp_path / "cc"
    liar.write_text("#!/bin/sh\necho 'this is not a compiler' >&2\nexit 1\n")
    liar.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: str(liar))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SetupError, match="this is not a compiler"):
        build.library(TIER, torch.float32)


def test_a_tier_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(
        build.torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True, "fma3": True}
    )
    assert build.supported_tiers() == ("avx2",)
    with pytest.raises(SetupError, match=r"need avx512.*has avx2"):
        open_native("avx512")
    monkeypatch.setattr(build.torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert build.supported_tiers() == ()
    with pytest.raises(SetupError, match="has none"):
        open_native()


@pytest.mark.parametrize("threads", [2, 8])
def test_more_threads_give_the_same_bits(dtype, threads):
    native = Native(build.supported_tiers()[0])
    site = Site(320, ("q", "k"), (704, 320))
    adapters = [{m: random_delta(r, 320, w) for m, w in zip("qk", site.widths, strict=True)} for r in (5, 16, 64)]
    slab, slots = filled_slab([site], adapters, dtype, native.layout)
    weight = native.pack(torch.randn(1024, 320).to(dtype))
    cases = [
        (torch.randn(batch.rows, 320).to(dtype), batch)
        for batch in (
            Batch.of([(slots[0], 150), (slots[1], 90), (None, 30)]),
            Batch.of([(slots[i % 3], 1) for i in range(24)]),
        )
    ]
    before = torch.get_num_threads()
    try:
        alone = [native.adapted_linear(x, weight, slab.views[0], batch) for x, batch in cases]
        native.set_threads(threads)
        for _ in range(20):
            for (x, batch), expected in zip(cases, alone, strict=True):
                assert torch.equal(native.adapted_linear(x, weight, slab.views[0], batch), expected)
    finally:
        native.set_threads(before)


def test_two_callers_share_the_pool_without_mixing_their_work():
    native = Native(build.supported_tiers()[0])
    weights = [native.pack(torch.full((2048, 512), float(value))) for value in (1, 2)]
    x = torch.ones(60, 512)
    wrong = []

    def work(value):
        for _ in range(60):
            if not (native.linear(x, weights[value - 1]) == 512.0 * value).all():
                wrong.append(value)

    before = torch.get_num_threads()
    try:
        native.set_threads(3)
        callers = [threading.Thread(target=work, args=(value,)) for value in (1, 2, 1, 2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        native.set_threads(before)
    assert not wrong
