"""From the `model` of a request to what answers it: authorized first, then looked up, then pinned."""

from __future__ import annotations

from dataclasses import dataclass

from loramill.errors import ModelNotFound
from loramill.names import SHORT, ModelName
from loramill.registry import adapters
from loramill.serve.api.auth import Caller
from loramill.serve.api.gateway import Gateway, Served


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request, from admission to its last token, whatever is promoted meanwhile.

    Attributes:
        model: the name as the caller wrote it.
        served: the base, and what generates with it.
        tenant: whom the work is counted to.
        version: the adapter's version; None: the base alone.
        fingerprint: OpenAI's `system_fingerprint`.
    """

    model: str
    served: Served
    tenant: str
    version: str | None
    created_at: float
    fingerprint: str

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {"x-loramill-version": self.version} if self.version else {}


def find_model(gateway: Gateway, caller: Caller, text: str) -> Target:
    """Resolves a model's name.

    Raises:
        Forbidden: another tenant's adapter, whether it exists or not.
        ModelNotFound: no such base, adapter, alias or version.
    """
    name = ModelName.parse(text)
    if name.adapter is None:
        served = gateway.served.get(name.base or "")
        if served is None:
            bases = ", ".join(f"'{base}'" for base in gateway.served)
            raise ModelNotFound(
                f"The model '{text}' does not exist. Bases here: {bases}; adapters are tenant/adapter.", param="model"
            )
        return Target(text, served, caller.tenant or "", None, 0.0, served.base.fingerprint[:SHORT])
    caller.check_adapter(name.adapter.tenant)
    with gateway.registry.reading() as session:
        version = adapters.resolve(session, name.adapter, name.selector)
    served = next((each for each in gateway.served.values() if each.base.fingerprint == version.base), None)
    if served is None:
        raise ModelNotFound(f"The model '{text}' was trained on a base that isn't served here.", param="model")
    fingerprint = f"{version.base[:SHORT]}-{version.id[:SHORT]}"
    return Target(text, served, caller.tenant or name.adapter.tenant, version.id, version.created_at, fingerprint)
