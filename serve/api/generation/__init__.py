"""One generation: its model, its admission, its chunks, and its metrics."""
