"""Benchmarks of training and of the queue."""
