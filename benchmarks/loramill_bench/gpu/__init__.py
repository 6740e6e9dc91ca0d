"""Checks and measurements of a machine with a GPU, which `benchmarks/gpu.py` runs.

It needs no Ray, no network and no weights: every base is random, with the shapes of a real one.
"""
