"""One script for a machine with a GPU: what must be right there, and how fast it is; `benchmarks/gpu.py` runs it.

It needs no Ray, no network and no weights: every base is random, with the shapes of a real one.
"""
