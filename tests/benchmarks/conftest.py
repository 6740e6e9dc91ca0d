"""The tiny base of serve's tests."""

from ..serve.conftest import tiny_base

__all__ = ["tiny_base"]
