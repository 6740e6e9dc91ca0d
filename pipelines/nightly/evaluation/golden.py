"""The golden set of an adapter: examples that a challenger has to answer right."""

from __future__ import annotations

import hashlib

import fsspec

from loramill.data.examples import Example, read_examples
from loramill.errors import SettingsInvalid, Unavailable
from loramill.names import AdapterName
from loramill.registry import Registry, datasets


def read_golden(registry: Registry, name: AdapterName, location: str) -> tuple[str, tuple[Example, ...]]:
    """Reads an adapter's golden set.

    Args:
        registry: the registry, which has the datasets.
        name: the adapter.
        location: a path or URL, in which {tenant} and {adapter} are replaced, or the ID of a dataset of the tenant.

    Returns:
        The ID of the dataset, or of a file the SHA-256 of its content; and the examples.

    Raises:
        NotFound: the tenant has no such dataset.
        SettingsInvalid: the file does not exist.
        Unavailable: it cannot be read now.
        DatasetInvalid: it has faults.
    """
    if location.startswith("file-"):
        with registry.reading() as session:
            found = datasets.get(session, location, name.tenant)
        return found.id, read_examples(registry.artifacts.read(found.artifact, "data.jsonl"), found.filename).examples
    url = location.replace("{tenant}", name.tenant).replace("{adapter}", name.adapter)
    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise SettingsInvalid(f"The golden set {url} does not exist: create it, or correct evaluate.golden.") from error
    except (OSError, ImportError, ValueError) as error:  # ValueError: fsspec does not know the protocol
        raise Unavailable(f"The golden set {url} can't be read: {error}.") from error
    return f"sha256:{hashlib.sha256(content).hexdigest()}", read_examples(content, url).examples
