"""The mathematics of training: batches, forward passes, optimizers, checkpoints and methods."""
