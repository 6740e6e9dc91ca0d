"""Fixtures of the tests that run in Triton's interpreter; a module that imports them has them for all its tests."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from triton import language
from triton.runtime import interpreter

__all__ = ["fast_interpreter", "interpreter_ranges", "nan_in_fresh_memory"]


@pytest.fixture(scope="module", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """Halves the interpreter's time, which Python takes between the operations.

    Three parts of it are not needed. Each call of a device function replaces the language, though its kernel did so
    (12%); once per module is enough. Each sum and product of int32 is checked for an overflow (26%); an address that
    overflowed is another one, whose value the tests don't expect. numpy's dtypes are looked up in a new dictionary
    (8%).
    """
    replaced, dtypes = set(), {}
    call, lookup, builder = (
        interpreter.InterpretedFunction.__call__,
        interpreter._get_np_dtype,
        interpreter.interpreter_builder,
    )

    def called(function: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
        if (module := function.fn.__module__) in replaced:
            return function.rewrite()(*arguments, **named)
        replaced.add(module)
        return call(function, *arguments, **named)

    def numpy_dtype(of: language.dtype) -> object:
        if (name := of.scalar.name) not in dtypes:
            dtypes[name] = lookup(of.scalar)
        return dtypes[name]

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter.InterpretedFunction, "__call__", called)
        context.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        context.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(scope="module", autouse=True)
def interpreter_ranges() -> Iterator[None]:
    """Lets `range` take numbers read on the device: the interpreter's are arrays, which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@pytest.fixture(scope="module", autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Makes `torch.empty` return NaN, so that memory that was read or left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
