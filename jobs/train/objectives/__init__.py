"""What a job optimizes: the loss of answers, or of preferences, over the passes of a batch."""
