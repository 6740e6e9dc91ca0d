"""ASGI middleware and the checks before every endpoint."""
