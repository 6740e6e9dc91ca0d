"""Downloads a version's files, all or none, and makes an adapter's a complete PEFT folder."""

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
    wire: Transport, name: str, to: Path, *, full: bool = False, on_bytes: Callable[[int, int], None] | None = None
) -> str:
    """Writes a version's files into the folder `to`, which must not be there yet, or be empty.

    What arrives is compared with the hashes that make up the version's own. Then, if the gateway serves the adapter's
    base, its adapter_config.json names that base as `from_pretrained` takes it, and the folder gets the base's
    tokenizer and a model card.

    Args:
        name: `tenant/adapter`, or with `@` an alias or version.
        full: the whole weights of a full fine-tune instead of the adapter.
        on_bytes: called with the bytes that have come and those that will in all.

    Returns:
        The version's id.

    Raises:
        InvalidRequest: `name` is no adapter's, or `to` holds something.
        ArtifactCorrupt: what came isn't what was stored; nothing is written.
        DiskFull: no room; nothing is written.
        LoramillError: what the gateway says; Unavailable: the answer was cut off; nothing is written.
    """
    from loramill.registry.artifacts.manifest import Manifest

    model = ModelName.parse(name)
    if model.adapter is None:
        raise InvalidRequest(f"'{name}' is no adapter; write it as tenant/adapter, or tenant/adapter@version.")
    path = f"/v1/adapters/{model.adapter}/files"
    listed = wire.request_json("GET", path, params={"version": model.selector, "full": full})
    try:
        version, artifact, files = str(listed["version"]), str(listed["artifact"]), listed["files"]
    except KeyError as error:
        raise unexpected_response(wire.url, f"{path} lists no files") from error
    manifest = Manifest.parse(json.dumps({"files": files}).encode(), wire.url, version if not full else artifact)
    come = 0
    with new_folder(to) as folder:
        for file, expected in manifest.files.items():
            digest, size = hashlib.sha256(), 0
            with (
                wire.stream(f"{path}/{quote(file)}", params={"version": version, "full": full}) as pieces,
                (folder / file).open("xb") as out,
            ):
                for piece in pieces:
                    out.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    come += len(piece)
                    if on_bytes is not None:
                        on_bytes(come, manifest.size)
            manifest.check(file, type(expected)(digest.hexdigest(), size), wire.url)
        if not full and CONFIG_FILE in manifest.files and (base := listed.get("base")) is not None:
            _add_base(wire, path, version, base, folder)
            complete_export(folder, str(model.adapter), version, str(base["source"]))
    return version


def _add_base(wire: Transport, path: str, version: str, base: Mapping[str, Any], folder: Path) -> None:
    """Adds the base's tokenizer, with which the adapter's prompts were made."""
    for file in base["tokenizer"]:
        if file not in TOKENIZER_FILES:  # a remote gateway must not choose what is written here
            raise unexpected_response(wire.url, f"{path} lists the file {file!r} as a tokenizer's")
        with (
            wire.stream(f"{path}/{quote(file)}", params={"version": version}) as pieces,
            (folder / file).open("xb") as out,
        ):
            out.writelines(pieces)
