"""Fine-tune jobs, from the queue to a published version. Layer 1; never imports serve."""
