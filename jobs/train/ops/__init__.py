"""Autograd operations that use less memory or time than PyTorch's own."""
