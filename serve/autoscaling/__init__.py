"""The number of engine replicas."""
