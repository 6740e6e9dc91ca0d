"""The Python client of a gateway."""

from loramill.client.client import Client

__all__ = ["Client"]
