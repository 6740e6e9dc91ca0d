"""What a job trains on a frozen base: one module a method, all with the same face."""
