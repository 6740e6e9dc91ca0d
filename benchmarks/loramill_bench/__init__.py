"""Benchmarks of loramill: kernels, engine, training and serving, with baselines and targets."""
