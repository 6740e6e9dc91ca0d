"""Benchmarks of loramill: kernels, engine, training and serving, against their rivals and targets."""
