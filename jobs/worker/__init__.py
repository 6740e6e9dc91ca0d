"""Runs one leased job, from its lease to its published version."""
