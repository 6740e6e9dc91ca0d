"""Nightly pipelines: collect, train, evaluate, gate, promote. Layer 2."""
