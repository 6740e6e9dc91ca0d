"""Adapters on their way from the registry to the slab."""
