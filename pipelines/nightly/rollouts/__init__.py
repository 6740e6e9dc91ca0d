"""Rollouts of challengers that passed the gate: canaries, watches, and when a version is rolled back."""
