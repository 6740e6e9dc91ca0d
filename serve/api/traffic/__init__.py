"""What the answers of versions are like, for rollouts: counting, writing, and copies of requests."""
