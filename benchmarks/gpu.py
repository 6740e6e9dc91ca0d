"""Checks and measures loramill on this machine's GPU, from a checkout that need not be installed.

See docs/howto/gpu-check.md.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
#: Folders of the top level that are packages of `loramill`; a copy of a checkout may have lost the links to them.
LINKED = ("kernels", "jobs", "serve", "pipelines")


def link_package(folder: Path) -> None:
    """Puts `loramill` into a folder, as links to the checkout.

    The checkout itself can't be on the path: transformers and bitsandbytes would take its `kernels` for a package of
    Hugging Face that has this name.
    """
    package = folder / "loramill"
    package.mkdir()
    for entry in (CHECKOUT / "loramill").iterdir():
        if entry.name not in LINKED:
            (package / entry.name).symlink_to(entry)
    for name in LINKED:
        (package / name).symlink_to(CHECKOUT / name)


def main() -> int:
    """Runs the stages with `loramill` as it is installed, or else with the one of the checkout."""
    # For the processes that stages start; this one finds `loramill_bench` next to the script.
    _extend_python_path(CHECKOUT / "benchmarks")
    if importlib.util.find_spec("loramill") is not None:
        return run()
    with tempfile.TemporaryDirectory(prefix="loramill-gpu-") as folder:
        link_package(Path(folder))
        sys.path.append(folder)
        _extend_python_path(Path(folder))
        return run()


def _extend_python_path(folder: Path) -> None:
    paths = (os.environ.get("PYTHONPATH"), str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def run() -> int:
    """Runs the command line."""
    from loramill_bench.gpu.command import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
