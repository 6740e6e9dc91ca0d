"""Collects an adapter's new data: validates it, removes duplicates, and holds a part out that is never trained on."""
