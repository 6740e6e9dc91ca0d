"""The gate: whether the scores of a challenger are evidence enough to promote it. Pure functions."""
