"""Nightly pipelines: collect, train, evaluate, gate, promote. Floor 2."""
