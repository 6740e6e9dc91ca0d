"""The whole system on one machine: start-up, its processes, and `loramill doctor`."""
