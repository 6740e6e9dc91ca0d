"""Model names in the API: `<base>`, `<tenant>/<adapter>`, `<tenant>/<adapter>@<alias or version>`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramill.errors import InvalidRequest, ModelNotFound

#: Matches the complete name of a tenant or an adapter.
NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$"
_NAME = re.compile(NAME_PATTERN)
_VERSION = re.compile(r"[0-9a-f]{8,64}")

#: Number of characters of a version's hash that are shown; any prefix of at least 8 is accepted.
SHORT_HASH_LENGTH = 12

#: Prefix of the ID of a job's results file, before the job's ID.
RESULTS_ID_PREFIX = "file-results-"


def results_id(job_id: str) -> str:
    """Returns the ID of a job's results file, a CSV of the metrics of each step."""
    return RESULTS_ID_PREFIX + job_id


@dataclass(frozen=True, slots=True)
class AdapterName:
    """A name that a tenant owns, such as `acme/support`."""

    tenant: str
    adapter: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}"

    def at(self, version: str) -> str:
        """Returns the model name of one version."""
        return f"{self}@{version[:SHORT_HASH_LENGTH]}"

    @classmethod
    def parse(cls, text: str) -> AdapterName:
        """Parses `tenant/adapter`.

        Raises:
            InvalidRequest: the text has a different form.
        """
        tenant, slash, adapter = text.partition("/")
        if not slash or "/" in adapter:
            raise InvalidRequest(f"'{text}' is not an adapter name; write it as tenant/adapter, such as acme/support.")
        adapter, at, _ = adapter.partition("@")
        name = cls(check_name(tenant, "tenant"), check_name(adapter, "adapter"))
        if at:
            raise InvalidRequest(
                f"'{text}' includes a version, but only an adapter's name is allowed here; write {name}."
            )
        return name


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed model name: a base (`adapter` is None), or an adapter with an alias or version."""

    base: str | None
    adapter: AdapterName | None
    selector: str = "champion"

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Parses the `model` of a request.

        Raises:
            ModelNotFound: the text is not a valid model name.
        """
        path, at, selector = text.partition("@")
        if "/" not in path:
            if at or not path:
                raise ModelNotFound(f"The model '{text}' does not exist.", param="model")
            return cls(base=path, adapter=None)
        try:
            adapter = AdapterName.parse(path)
        except InvalidRequest as error:
            raise ModelNotFound(f"The model '{text}' does not exist. {error.message}", param="model") from error
        if at and not selector:
            raise ModelNotFound(f"The model '{text}' does not exist: there is nothing after the '@'.", param="model")
        return cls(base=None, adapter=adapter, selector=selector or "champion")


def check_name(text: str, kind: str) -> str:
    """Returns `text` if it is a valid name for a tenant or an adapter.

    Raises:
        InvalidRequest: the name is not valid; the message contains the rule.
    """
    if not _NAME.fullmatch(text):
        article = "an" if kind[0] in "aeiou" else "a"
        raise InvalidRequest(
            f"'{text}' is not a valid name for {article} {kind}: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning and ending with a letter or a digit."
        )
    return text


def is_version(selector: str) -> bool:
    """Returns whether the selector after an `@` is a version's hash or a prefix of one (8 to 64 hex digits)."""
    return _VERSION.fullmatch(selector) is not None
