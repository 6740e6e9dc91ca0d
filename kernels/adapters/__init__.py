"""Adapters in memory: packed, resident in a slab, copied to a GPU beside its steps."""
