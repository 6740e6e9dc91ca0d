"""The nightly run: collect, train, evaluate, gate, promote."""
