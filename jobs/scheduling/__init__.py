"""What runs where: the decision, and the reconciler that applies it."""
