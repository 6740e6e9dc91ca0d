"""Fine-tune jobs: from a leased job to a published version. Floor 1; never imports serve."""
