"""Commands that run on this machine: `up`, `down`, `join`, `doctor`, `settings` and `compare`."""
