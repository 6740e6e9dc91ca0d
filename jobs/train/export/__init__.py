"""Versions and models from what was trained."""
