"""Training data: reading, checking, and rendering it as tokens."""
