"""The native CPU backend: C kernels that are compiled at first use."""
