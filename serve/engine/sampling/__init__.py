"""Samples tokens from logits, on the CPU or on a GPU, and computes log probabilities."""
