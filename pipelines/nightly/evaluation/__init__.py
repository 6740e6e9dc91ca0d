"""Evaluation: what the candidates of a nightly run answer to held-out examples, and how it is scored."""
