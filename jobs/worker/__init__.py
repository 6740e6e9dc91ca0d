"""Runs leased jobs, each up to its published version."""
