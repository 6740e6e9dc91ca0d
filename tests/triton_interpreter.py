"""Fixtures of the tests that run in Triton's interpreter; a module that imports them has them for all its tests."""

from collections.abc import Iterator

import pytest
import torch
from triton.runtime import interpreter

__all__ = ["interpreter_ranges", "nan_in_fresh_memory"]


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
