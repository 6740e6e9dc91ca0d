"""Prometheus metrics of gateways and engines."""
