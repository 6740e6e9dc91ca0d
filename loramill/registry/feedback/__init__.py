"""Stored completions, and the ratings and corrections of their answers."""
