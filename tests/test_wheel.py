"""The wheel holds the tree: a subpackage that pyproject.toml forgets is found here, not by a user."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "jobs", "serve", "pipelines")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder leaves a trace in either."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("loramill", *PACKAGES):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (built,) = out.glob("*.whl")
    return built


def in_tree() -> set[str]:
    """Every file of the packages, under the name it must have in the wheel."""
    files = {
        (file.relative_to(ROOT) if name == "loramill" else Path("loramill") / file.relative_to(ROOT)).as_posix()
        for name in ("loramill", *PACKAGES)
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"loramill/kernels/__init__.py", "loramill/serve/engine/__init__.py", "loramill/errors.py"} <= files
    return files


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, unexpected = in_tree() - packed, packed - in_tree()
    assert not missing, "a folder has no __init__.py, or names are missing in package-data"
    assert not unexpected


@pytest.mark.slow
def test_every_module_of_the_wheel_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib, pkgutil, loramill\n"
        f"assert loramill.__file__.startswith({str(tmp_path)!r})\n"
        "for module in pkgutil.walk_packages(loramill.__path__, 'loramill.'):\n"
        "    if not module.name.endswith(('__main__', 'migrations.env')):\n"
        "        importlib.import_module(module.name)\n"
    )
    command = [sys.executable, "-P", "-c", code]
    ran = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_wheel_is_typed_licensed_and_has_the_command(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(entry_points).decode())
        (license_file,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    assert "loramill/py.typed" in names
    assert dict(scripts["console_scripts"]) == {"loramill": "loramill.cli:main"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_has_no_import_name_of_its_own(name: str, tmp_path: Path) -> None:
    """`kernels` is a Hugging Face package, and ours must not shadow it."""
    code = f"import importlib.util as u; spec = u.find_spec('{name}'); print(spec and spec.origin)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert str(ROOT) not in ran.stdout
