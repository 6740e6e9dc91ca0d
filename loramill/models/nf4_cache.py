"""A base's linears in NF4 on disk: the first process quantizes them, and all later ones read the same codes."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loramill.kernels.quantization import PackedNf4, pack_nf4
from loramill.storage.atomic import share

#: Increases with every change of the files, so that older ones are not used.
FORMAT = 2
#: Number of most recently used bases that are kept.
KEPT = 3
#: Seconds after which a file that is still being written belongs to a process that was killed.
_ABANDONED_SECONDS = 3600

log = logging.getLogger(__name__)


class Nf4Cache:
    """The linears of one base, each in a file `<cache>/nf4/<fingerprint>-<format>/<module>.safetensors`.

    The fingerprint covers weights and quantization, so another version of a base has another folder. A file is created
    by a hard link and never replaced: any number of processes may quantize at once, and all use the codes of the first
    one to finish, whatever their devices. A file that is damaged or another module's is deleted and written again. If
    the folder can't be written to, `pack` quantizes each time.
    """

    def __init__(self, cache: Path, fingerprint: str, device: torch.device) -> None:
        """
        Args:
            cache: folder of all caches.
            fingerprint: that of the base.
            device: where `pack` returns the weights.
        """
        self._folder = cache / "nf4" / f"{fingerprint}-{FORMAT}"
        self._fingerprint = fingerprint
        self._device = device
        self._writes = True
        if self._folder.is_dir():
            _mark_as_used(self._folder)

    def pack(self, name: str, weight: Callable[[], torch.Tensor]) -> PackedNf4:
        """The weight of a module from its file; otherwise, quantizes `weight()` where it is and writes the file.

        Raises:
            SetupError: bitsandbytes isn't installed.
        """
        file = self._folder / f"{name}.safetensors"
        found = self._read(file, name)
        if found is not None:
            return found
        packed = pack_nf4(weight())
        if self._writes and not self._write(file, name, packed):
            return self._read(file, name) or packed
        return packed

    def _read(self, file: Path, module: str) -> PackedNf4 | None:
        try:
            with safe_open(file, framework="pt", device=str(self._device)) as opened:
                names = opened.keys()
                tensors = {name: opened.get_tensor(name) for name in names}
                metadata = opened.metadata()
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            _discard(file, str(error))
            return None
        if metadata != self._metadata(module, tensors):
            _discard(file, "its base, module or checksum does not match")
            return None
        return PackedNf4.of_tensors(tensors)

    def _metadata(self, module: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        return {"base": self._fingerprint, "module": module, "checksum": _checksum(tensors)}

    def _write(self, file: Path, module: str, packed: PackedNf4) -> bool:
        """Writes a file; returns False if another process wrote it meanwhile."""
        tensors = packed.tensors()
        building = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
                remove_unused(self._folder.parent)
            save_file(tensors, building, metadata=self._metadata(module, tensors))
            share(building)
            os.link(building, file)
        except FileExistsError:
            return False
        except (SafetensorError, OSError) as error:
            log.warning("quantized weights can't be written to %s; every start quantizes: %s", self._folder, error)
            self._writes = False
        finally:
            with suppress(OSError):
                building.unlink()
        return True


def _discard(file: Path, reason: str) -> None:
    log.warning("%s is damaged (%s): its module is quantized again", file, reason)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s can't be deleted: %s", file, error)


def remove_unused(root: Path) -> None:
    """Deletes folders of other formats, all but the `KEPT` bases used last, and files of processes that were killed.

    A process that reads from a deleted folder quantizes the modules that it has not read yet.
    """
    folders = [folder for folder in root.iterdir() if folder.is_dir()]
    current = sorted(
        (folder for folder in folders if folder.name.endswith(f"-{FORMAT}")), key=lambda folder: -folder.stat().st_mtime
    )
    for folder in folders:
        if folder not in current[:KEPT]:
            log.info("deleting quantized weights, since other bases were used later: %s", folder)
            shutil.rmtree(folder, ignore_errors=True)
    for file in root.glob("*/.*"):
        if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
            file.unlink(missing_ok=True)


def _mark_as_used(folder: Path) -> None:
    try:
        os.utime(folder)
    except OSError as error:
        log.info("the last use of %s can't be recorded: %s", folder, error)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sum of each tensor's 64-bit words, computed on its device; it detects pages that were never written."""

    def words(tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.reshape(-1).view(torch.uint8)
        # A copy, since a tensor in a mapped file may begin anywhere.
        return F.pad(data, (0, -len(data) % 8)).view(torch.int64)

    return " ".join(f"{name}={int(words(tensors[name]).sum())}" for name in sorted(tensors))
