"""Serves random requests and checks every answer: `loramill-bench soak`."""
