"""The native CPU backend: C kernels, compiled at first use."""
