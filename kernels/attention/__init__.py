"""Attention in torch: over paged keys and values, over rows of many lengths, and with a cap on scores."""
