"""Compilation of kernels in parallel, before the steps that launch them.

A first step would compile its kernels one after another, 0.3 to 2 s each. Here, steps are run once without launching
anything: Triton's hook before a compilation (`knobs.runtime.jit_cache_hook`) hands the kernel with its specialization
to a pool of threads, and skips the launch. Threads suffice: Triton's passes, LLVM and ptxas run without Python's lock,
and each compilation has a context of its own (`triton.AsyncCompileMode` relies on the same).
"""

from __future__ import annotations

import ast
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton import JITFunction, knobs
from triton.runtime import driver

log = logging.getLogger(__name__)


@contextmanager
def parallel_compilation() -> Iterator[None]:
    """Compiles kernels in other threads instead of launching them; at the end of the block, all are compiled.

    Results that are computed in the block are arbitrary. A kernel that can't be compiled causes a warning in the
    log, and raises its error at its next launch. Only the thread that entered the block may launch kernels in it.
    """
    pending: dict[tuple[object, str], Future[None]] = {}

    def start(*, key: str, fn: Any, is_manual_warmup: bool, **more: Any) -> bool:
        if is_manual_warmup:  # the compilation in a thread of the pool
            return False
        kernel, details = fn.jit_function, more["compile"]
        if (kernel, key) not in pending:
            pending[kernel, key] = pool.submit(_compile, kernel, details["specialization_data"], details["device"])
        return True

    before = knobs.runtime.jit_cache_hook
    threads = min(16, os.cpu_count() or 1)
    with _one_parse_at_a_time(), ThreadPoolExecutor(threads, thread_name_prefix="kernel-compiler") as pool:
        knobs.runtime.jit_cache_hook = start
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before
    for (kernel, _), compilation in pending.items():
        if (error := compilation.exception()) is not None:
            log.warning("The kernel %s was not compiled ahead: %r.", kernel, error)


@contextmanager
def _one_parse_at_a_time() -> Iterator[None]:
    """Lets only one thread at a time parse a kernel, which takes 1 ms.

    CPython 3.11 has one counter per interpreter for the depth of the tree that `ast.parse` builds. A garbage collection
    within it runs Python code, so threads may be switched there; if the other thread parses, too, one of them raises
    SystemError.
    """
    parse, turn = JITFunction.parse, threading.Lock()

    def parse_alone(kernel: JITFunction[Any]) -> ast.Module:
        with turn:
            tree: ast.Module = parse(kernel)
            return tree

    JITFunction.parse = parse_alone
    try:
        yield
    finally:
        JITFunction.parse = parse


def _compile(kernel: Any, specialization: str, device: int) -> None:
    driver.active.set_current_device(device)
    kernel.preload(specialization)
