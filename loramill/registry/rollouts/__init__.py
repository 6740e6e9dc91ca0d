"""Rollouts of adapters: canaries, shadows and watches, and the traffic by which versions are compared."""
