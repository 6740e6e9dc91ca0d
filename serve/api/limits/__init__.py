"""Rate limits and usage."""
