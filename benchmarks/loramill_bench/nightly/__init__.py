"""Benchmarks of the nightly run."""
