"""loramill: many tenants, one base model, an adapter each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramill.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that kernels and engine import where httpx and pydantic aren't installed.
    if name == "Client":
        from loramill.client import Client

        return Client
    raise AttributeError(f"module 'loramill' has no attribute '{name}'")
