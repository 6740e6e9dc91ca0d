"""Autograd operations that need less memory or time than PyTorch's own."""
