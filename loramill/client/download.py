"""Downloads the files of a version as a complete PEFT folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loramill.client.adapter_folder import CONFIG_FILE, TOKENIZER_FILES, complete_export
from loramill.client.http import Transport, unexpected_response
from loramill.errors import InvalidRequest
from loramill.names import ModelName
from loramill.storage.atomic import new_folder


def download(
    transport: Transport, name: str, to: Path, *, full: bool = False, on_bytes: Callable[[int, int], None] | None = None
) -> str:
    """Writes a version's files into the folder `to`, which must be new or empty.

    Each file is compared with the hash that is part of the version's own. If the gateway serves the adapter's base, the
    folder also gets a reference to that base for `from_pretrained`, the base's tokenizer, and a model card.

    Args:
        transport: Connection to the gateway.
        name: `tenant/adapter`, or with `@` an alias or version.
        to: Folder to create.
        full: Download the complete weights of a full fine-tune instead of the adapter.
        on_bytes: Called with the number of bytes received so far and the total.

    Returns:
        The version's id.

    Raises:
        InvalidRequest: `name` is not the name of an adapter, or `to` is not empty.
        ArtifactCorrupt: A file differs from what was stored; nothing is written.
        DiskFull: The disk is full; nothing is written.
        LoramillError: The error that the gateway reports. Unavailable: the response was cut off. Nothing is written.
    """
    from loramill.storage.manifest import Manifest

    model = ModelName.parse(name)
    if model.adapter is None:
        raise InvalidRequest(f"'{name}' is not an adapter; write it as tenant/adapter, or tenant/adapter@version.")
    path = f"/v1/adapters/{model.adapter}/files"
    listed = transport.request_json("GET", path, params={"version": model.selector, "full": full})
    try:
        version, artifact, files = str(listed["version"]), str(listed["artifact"]), listed["files"]
    except KeyError as error:
        raise unexpected_response(transport.url, f"{path} lists no files") from error
    manifest = Manifest.parse(json.dumps({"files": files}).encode(), transport.url, version if not full else artifact)
    received = 0
    with new_folder(to) as folder:
        for file, expected in manifest.files.items():
            digest, size = hashlib.sha256(), 0
            with (
                transport.stream(f"{path}/{quote(file)}", params={"version": version, "full": full}) as pieces,
                (folder / file).open("xb") as out,
            ):
                for piece in pieces:
                    out.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    received += len(piece)
                    if on_bytes is not None:
                        on_bytes(received, manifest.size)
            manifest.check(file, type(expected)(digest.hexdigest(), size), transport.url)
        if not full and CONFIG_FILE in manifest.files and (base := listed.get("base")) is not None:
            _add_base(transport, path, version, base, folder)
            complete_export(folder, str(model.adapter), version, str(base["source"]))
    return version


def _add_base(transport: Transport, path: str, version: str, base: Mapping[str, Any], folder: Path) -> None:
    """Adds the base's tokenizer, which produced the adapter's training prompts."""
    for file in base["tokenizer"]:
        if file not in TOKENIZER_FILES:  # a remote gateway must not choose what is written here
            raise unexpected_response(transport.url, f"{path} lists {file!r} as a file of the tokenizer")
        with (
            transport.stream(f"{path}/{quote(file)}", params={"version": version}) as pieces,
            (folder / file).open("xb") as out,
        ):
            out.writelines(pieces)
