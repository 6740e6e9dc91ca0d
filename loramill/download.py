"""A version's files brought to this machine: all of them, as they were stored, or none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from loramill.durable import new_folder
from loramill.errors import InvalidRequest
from loramill.names import ModelName
from loramill.wire import Wire, foreign


def download(
    wire: Wire, name: str, to: Path, *, full: bool = False, on_bytes: Callable[[int, int], None] | None = None
) -> str:
    """Writes a version's files into the folder `to`, which must not be there yet, or be empty.

    What arrives is compared with the hashes that make up the version's own.

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
    from loramill.registry.manifest import Manifest

    model = ModelName.parse(name)
    if model.adapter is None:
        raise InvalidRequest(f"'{name}' is no adapter; write it as tenant/adapter, or tenant/adapter@version.")
    path = f"/v1/adapters/{model.adapter}/files"
    listed = wire.call("GET", path, params={"version": model.selector, "full": full})
    try:
        version, artifact, files = str(listed["version"]), str(listed["artifact"]), listed["files"]
    except KeyError as error:
        raise foreign(wire.url, f"{path} lists no files") from error
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
    return version
