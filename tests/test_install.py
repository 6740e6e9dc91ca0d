"""The installation: pins agree with pyproject.toml, and a failed install runs again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
#: Extras that are not tested here, and so not pinned.
UNPINNED = {"wandb", "mlflow"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        each for extra, listed in project["optional-dependencies"].items() if extra not in UNPINNED for each in listed
    ]
    found = [Requirement(each) for each in [*project["dependencies"], *extras]]
    return [each for each in found if each.name != "loramill"]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


@pytest.mark.parametrize(
    ("pip", "imports", "finishes"),
    [(0, 0, True), (1, 0, False), (0, 1, False)],
    ids=["all works", "pip fails", "the installed packages can't be imported"],
)
def test_only_an_install_that_worked_is_marked_as_finished(
    pip: int, imports: int, finishes: bool, tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "loramill" / "jobs").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        '[ "$1 $2" = "-m venv" ] || exit 0\n'
        'mkdir -p "$3/bin" && cd "$3/bin"\n'
        f"printf '#!/bin/sh\\nexit {pip}\\n' >pip\n"
        f"printf '#!/bin/sh\\nexit {imports}\\n' >python\n"
        "chmod +x pip python\n"
    )
    python.chmod(0o755)
    stamp = tmp_path / ".venv" / ".installed"
    ran = make_install(tmp_path, f"PYTHON={python}")
    assert (ran.returncode == 0, stamp.exists()) == (finishes, finishes), ran.stdout + ran.stderr
    assert "Installing into .venv" in ran.stdout


def test_a_clone_without_links_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "loramill").mkdir()
    (tmp_path / "loramill" / "jobs").write_text("../jobs")
    ran = make_install(tmp_path)
    assert ran.returncode and "loramill/jobs is not a link" in ran.stdout


def make_install(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `make install` in a folder, without the flags of a make that runs these tests."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    command = ["make", "-C", str(folder), "install", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
