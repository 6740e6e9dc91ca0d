"""Model names on the wire: `<base>`, `<tenant>/<adapter>`, `<tenant>/<adapter>@<alias or version>`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramill.errors import InvalidRequest, ModelNotFound

#: What can name a tenant or an adapter, whole.
NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$"
_NAME = re.compile(NAME_PATTERN)
_VERSION = re.compile(r"[0-9a-f]{8,64}")

#: Characters of a version's hash that are shown; any prefix of at least 8 is understood.
SHORT_HASH_LENGTH = 12

#: Ids of jobs' results files begin so; the job's id follows.
RESULTS_ID_PREFIX = "file-results-"


def results_id(job_id: str) -> str:
    """The id of a job's results file: a CSV of what was measured at each step."""
    return RESULTS_ID_PREFIX + job_id


@dataclass(frozen=True, slots=True)
class AdapterName:
    """A name that a tenant owns, such as `acme/support`."""

    tenant: str
    adapter: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}"

    def at(self, version: str) -> str:
        """The name on the wire that pins one version."""
        return f"{self}@{version[:SHORT_HASH_LENGTH]}"

    @classmethod
    def parse(cls, text: str) -> AdapterName:
        """Reads `tenant/adapter`.

        Raises:
            InvalidRequest: the text has another form.
        """
        tenant, slash, adapter = text.partition("/")
        if not slash or "/" in adapter:
            raise InvalidRequest(f"'{text}' is no adapter name; write it as tenant/adapter, such as acme/support.")
        return cls(check_name(tenant, "tenant"), check_name(adapter, "adapter"))


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a request's `model` says: a base (`adapter` is None), or an adapter at an alias or version."""

    base: str | None
    adapter: AdapterName | None
    selector: str = "champion"

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Reads the `model` of a request.

        Raises:
            ModelNotFound: the text can't be the name of a model.
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
            raise ModelNotFound(f"The model '{text}' does not exist: nothing follows the '@'.", param="model")
        return cls(base=None, adapter=adapter, selector=selector or "champion")


def check_name(text: str, kind: str) -> str:
    """Returns `text` if it can name a tenant or an adapter.

    Raises:
        InvalidRequest: it can't; the message gives the rule.
    """
    if not _NAME.fullmatch(text):
        article = "an" if kind[0] in "aeiou" else "a"
        raise InvalidRequest(
            f"'{text}' can't name {article} {kind}: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning and ending with a letter or a digit."
        )
    return text


def is_version(selector: str) -> bool:
    """Whether an `@` selector is a version's hash or a prefix of one (8 to 64 hex digits)."""
    return _VERSION.fullmatch(selector) is not None
