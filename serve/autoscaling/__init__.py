"""How many replicas run."""
