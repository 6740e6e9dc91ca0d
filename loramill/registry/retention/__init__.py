"""Retention: versions and checkpoints that no one needs any more are removed after a number or an age."""
