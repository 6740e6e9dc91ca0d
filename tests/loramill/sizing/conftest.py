"""Estimates are of products in the base's dtype, whatever this processor has instructions for."""

from __future__ import annotations

import pytest

from loramill.kernels import products


@pytest.fixture(autouse=True)
def products_in_the_bases_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is converted for products in float32 is limited to some MiB, which tests/kernels/test_products.py checks."""
    monkeypatch.setattr(products, "_lacks_bfloat16", lambda: False)
