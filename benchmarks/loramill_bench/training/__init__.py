"""Benchmarks of training, the job queue, and sizing's memory estimates."""
