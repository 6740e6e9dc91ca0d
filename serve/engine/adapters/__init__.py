"""Loads adapters from disk into slots."""
