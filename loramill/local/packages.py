"""Checks of installed packages: their versions, and the command that installs a missing one."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from loramill import __version__
from loramill.extras import install_command
from loramill.local.findings import Finding, Status
from loramill.settings import Settings

if TYPE_CHECKING:
    from packaging.requirements import Requirement

#: Versions that were tested together, as in constraints.txt.
TESTED_VERSIONS = {
    "alembic": "1.20.1",
    "bitsandbytes": "0.50.2",
    "cronsim": "2.8",
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "fastapi": "0.165.0",
    "fastapi-offline": "1.7.7",
    "fsspec": "2026.9.0",
    "gguf": "0.19.0",
    "httptools": "0.9.0",
    "httpx": "0.28.1",
    "huggingface-hub": "2.4.0",
    "jinja2": "3.1.6",
    "llguidance": "1.9.1",
    "matplotlib": "3.11.2",
    "msgpack": "1.2.4",
    "numpy": "2.4.6",
    "openai": "3.54.0",
    "packaging": "26.3",
    "peft": "0.21.2",
    "plotext": "6.1.0",
    "prometheus-client": "0.26.0",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "pydantic-settings": "2.16.3",
    "python-multipart": "0.0.34",
    "pyyaml": "6.0.3",
    "ray": "2.60.0",
    "regex": "2026.11.15",
    "rensa": "0.5.0",
    "rich": "15.0.0",
    "safetensors": "0.8.0",
    "sqlalchemy": "2.1.9",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "typer": "0.29.2",
    "tzdata": "2026.6",
    "uvicorn": "0.54.0",
}


def packages(_: Settings) -> Iterable[Finding]:
    """Checks the versions of loramill and its packages; only those of the extra `local` must be installed."""
    from packaging.utils import canonicalize_name

    yield Finding(what="loramill", status=Status.OK, found=__version__)
    needed = {each.name for each in requirements("" if is_client_only() else "local")}
    if is_client_only():
        found = "not installed: only the commands that call a gateway work"
        yield Finding(what="extra local", status=Status.WARN, found=found, fix=install_command("torch"))
    for requirement in {each.name: each for each in requirements("all")}.values():
        version = installed_version(requirement.name)
        if version is None and requirement.name not in needed:
            continue
        tested = TESTED_VERSIONS.get(canonicalize_name(requirement.name))
        yield judge_package(requirement.name, str(requirement.specifier), version, tested)


def collapse_packages(findings: Sequence[Finding]) -> list[Finding]:
    """Combines the findings on all packages without problems into one, for display."""
    well = [
        each.what
        for each in findings
        if each.status is Status.OK and each.what.lower().replace("_", "-") in TESTED_VERSIONS
    ]
    rest = [each for each in findings if each.what not in well]
    if well:
        rest.insert(1, Finding(what="packages", status=Status.OK, found=f"{len(well)} as required; --json lists them"))
    return rest


def is_client_only() -> bool:
    """Whether the extra `local` is not installed."""
    return installed_version("torch") is None


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(extra: str) -> Iterable[Requirement]:
    """Yields the requirements of an extra of loramill, including those of the extras in it."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, importlib.metadata.requires("loramill") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            if requirement.name == "loramill":
                yield from chain.from_iterable(map(requirements, requirement.extras))
            else:
                yield requirement


def judge_package(name: str, required: str, version: str | None, tested: str | None) -> Finding:
    """Judges a package.

    Args:
        name: Name of the package.
        required: Version specifier.
        version: Installed version, or None.
        tested: Version that loramill was tested with, if known.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if version is None:
        return Finding(what=name, status=Status.ERROR, found="not installed", fix=install_command(name))
    fix = f"pip install '{name}{required}'"
    if not SpecifierSet(required).contains(version, prereleases=True):
        found = f"{version}, but loramill needs {required}"
        return Finding(what=name, status=Status.ERROR, found=found, fix=fix)
    if tested is not None and Version(version).release[:2] > Version(tested).release[:2]:
        found = f"{version}, newer than what was tested ({tested})"
        return Finding(what=name, status=Status.WARN, found=found, fix=f"pip install '{name}=={tested}' if it fails")
    return Finding(what=name, status=Status.OK, found=version)


def fix_of(error: Exception, fix: str) -> str:
    """Returns the command that installs the extra of a missing package; `fix` if the error has another cause."""
    missing = re.search(r"No module named '(\w+)'", str(error))
    return install_command(missing[1]) if missing and missing[1] != "loramill" else fix
