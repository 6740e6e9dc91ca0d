"""What the endpoints of an adapter share: its path, its name and its object."""

from __future__ import annotations

from typing import Any

from loramill.names import AdapterName
from loramill.serve.api.middleware.authentication import Caller
from loramill.types import AdapterRecord

ADAPTER_PATH = "/v1/adapters/{tenant}/{adapter}"


def authorized_name(caller: Caller, tenant: str, adapter: str) -> AdapterName:
    """Returns the adapter's name if the caller may use it.

    Raises:
        Forbidden: the adapter belongs to another tenant, whether it exists or not.
        InvalidRequest: the name is invalid.
    """
    caller.check_adapter(tenant)
    return AdapterName.parse(f"{tenant}/{adapter}")


def adapter_object(record: AdapterRecord) -> dict[str, Any]:
    """Returns an adapter object."""
    return record.model_dump() | {"id": record.name, "object": "adapter"}
