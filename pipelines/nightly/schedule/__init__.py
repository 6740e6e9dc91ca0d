"""The schedule of nightly runs: when a run is due, and the loop that starts it."""
