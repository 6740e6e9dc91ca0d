"""Adapters in memory: packed, resident in a slab, and copied to a GPU while it runs steps."""
