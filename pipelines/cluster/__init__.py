"""The whole system on one Ray cluster."""
