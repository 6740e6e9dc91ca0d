"""Nightly runs with other kinds of training are tested on the cluster of those without."""

from __future__ import annotations

from ..test_run import cluster  # noqa: F401
