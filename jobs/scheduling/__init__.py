"""Decides what runs where, and applies the decision."""
