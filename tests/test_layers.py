"""The layers, enforced: every import of the five packages is checked.

Layer 0 is loramill and kernels, layer 1 jobs and serve, layer 2 pipelines; a package imports only itself and lower
layers. Only `loramill/cli` (or `cli_….py`) imports upward, and only inside functions.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "jobs", "serve", "pipelines")

#: Packages that a package may import besides itself.
BELOW = {
    "loramill": {"kernels"},
    "kernels": {"loramill"},
    "jobs": {"loramill", "kernels"},
    "serve": {"loramill", "kernels"},
    "pipelines": {"loramill", "kernels", "jobs", "serve"},
}
RAY_SHELLS = (
    "jobs/ray/*",
    "serve/deployments.py",
    "serve/replica/engine_deployment.py",
    "serve/transport/handle.py",
    "serve/ray_private.py",
    "serve/routing/ray_router.py",
    "serve/autoscaling/ray_policy.py",
    "pipelines/cluster/*",
)
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

#: Modules that import on a GPU machine with torch and little else, and the libraries that they may use.
LEAN = ("kernels/*", "serve/engine/*", "serve/model/*")
LEAN_LIBRARIES = {"torch", "numpy", "safetensors", "triton"}
#: Libraries that a lean module may import inside functions, where they are installed.
OPTIONAL = {
    "serve/model/hf.py": "transformers",
    "kernels/quantization.py": "bitsandbytes",
    "kernels/triton/quantized.py": "bitsandbytes",
}
LEAN_MODULES = (
    "loramill.errors",
    "loramill.gpus",
    "loramill.kernels",
    "loramill.serve.engine",
    "loramill.serve.model",
    "loramill.serve.sampling_params",
    "loramill.storage.safetensors_header",
)


@dataclass(frozen=True)
class Import:
    """One import: the module's full name, its line, and whether it is inside a function."""

    module: str
    line: int
    in_function: bool


def module_name(path: str) -> str:
    """`serve/engine/engine.py` -> `loramill.serve.engine.engine`."""
    parts = Path(path).with_suffix("").parts
    parts = parts if parts[0] == "loramill" else ("loramill", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, source: str, modules: frozenset[str]) -> Iterator[Import]:
    """All imports of a source, at any depth; `from a import b` is `a.b` where that is a module."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for name in imported(child):
                yield Import(name, child.lineno, in_function)
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, inside)

    def imported(node: ast.AST) -> list[str]:
        match node:
            case ast.Import(names=names):
                return [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                origin = ".".join(filter(None, [package(level), module]))
                return [f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in modules else origin for alias in names]
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                return [name]
            case _:
                return []

    def package(level: int) -> str:
        if not level:
            return ""
        parts = module_name(path).split(".")
        up = level - 1 if path.endswith("__init__.py") else level
        return ".".join(parts[: len(parts) - up])

    yield from walk(ast.parse(source), False)


def package_of(module: str) -> str | None:
    """The package that a module belongs to; None for other libraries."""
    first, _, rest = module.partition(".")
    if first != "loramill":
        return None
    second = rest.partition(".")[0]
    return second if second in PACKAGES else "loramill"


def is_cli(module: str) -> bool:
    return re.match(r"loramill\.cli(?:[._]|$)", module) is not None


def any_match(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def fault(path: str, found: Import) -> str | None:
    """Why an import is forbidden, or None."""
    own, other = package_of(module_name(path)), package_of(found.module)
    top = found.module.partition(".")[0]
    if top in PACKAGES:
        return f"write loramill.{found.module}: a bare {top} may be another package"
    if top in UNPICKLERS:
        return "no module unpickles"
    if top == "ray" and not any_match(path, RAY_SHELLS):
        return f"only {', '.join(RAY_SHELLS)} may import ray"
    if any_match(path, LEAN) and not is_lean(found.module) and not (found.in_function and OPTIONAL.get(path) == top):
        return f"{', '.join(LEAN)} import only {', '.join(sorted(LEAN_LIBRARIES))} and {', '.join(LEAN_MODULES)}"
    if other is None or is_cli(module_name(path)):
        upward = other in ("jobs", "serve", "pipelines") and not found.in_function
        return "the command line imports upper layers only inside functions" if upward else None
    if is_cli(found.module):
        return "no module imports the command line"
    if other != own and other not in BELOW[own or ""]:
        return f"{own} may not import {other}"
    return None


def is_lean(module: str) -> bool:
    if package_of(module) is None:
        return module.partition(".")[0] in LEAN_LIBRARIES | sys.stdlib_module_names
    return any(module == allowed or module.startswith(f"{allowed}.") for allowed in LEAN_MODULES)


def faults(sources: Mapping[str, str]) -> list[str]:
    """All faults of a tree of sources, each with file and line."""
    modules = frozenset(map(module_name, sources))
    return [
        f"{path}:{found.line} imports {found.module}: {wrong}"
        for path, source in sources.items()
        for found in imports(path, source, modules)
        if (wrong := fault(path, found))
    ]


def tree() -> dict[str, str]:
    files = (file for top in ("loramill", *PACKAGES) for file in sorted((ROOT / top).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_every_package_imports_only_lower_layers() -> None:
    sources = tree()
    assert {path.split("/")[0] for path in sources} == {"loramill", *PACKAGES}
    assert faults(sources) == []


#: A small tree without a fault.
SOURCES = {
    "loramill/errors.py": "import enum\n",
    "loramill/settings.py": "import pydantic\n",
    "loramill/client.py": "import httpx\nfrom loramill import errors\n",
    "loramill/__init__.py": "def f():\n    from loramill.client import Client\n",
    "loramill/cli.py": "def up():\n    from loramill.pipelines import nightly\n    import loramill.jobs.queue\n",
    "kernels/__init__.py": "import torch\nfrom loramill.errors import LoramillError\nfrom . import reference\n",
    "kernels/reference.py": "import math\n",
    "jobs/queue.py": "from loramill import settings\nfrom loramill.kernels import reference\n",
    "jobs/ray/supervisor.py": "import ray\n",
    "serve/engine/engine.py": "from loramill.kernels import reference\nfrom ..model import decoder\n",
    "serve/model/decoder.py": "import safetensors.torch\n",
    "serve/api.py": "import fastapi\nfrom loramill.serve.engine import engine\n",
    "pipelines/nightly.py": "import loramill.jobs.queue\nimport loramill.serve.api\n",
    "pipelines/cluster/deploy.py": "import ray\n",
}


def test_a_tree_in_order_has_no_faults() -> None:
    assert faults(SOURCES) == []


@pytest.mark.parametrize(
    ("path", "source", "fragment"),
    [
        ("loramill/errors.py", "import loramill.jobs.queue", "loramill may not import jobs"),
        ("loramill/errors.py", "from loramill import serve", "loramill may not import serve"),
        ("loramill/errors.py", "def f():\n    import loramill.pipelines.nightly", "loramill may not import pipelines"),
        ("loramill/errors.py", "import ray", "may import ray"),
        ("loramill/cli.py", "from loramill.jobs import queue", "only inside functions"),
        ("loramill/cli_jobs.py", "import loramill.serve.api", "only inside functions"),
        ("loramill/cli.py", "def up():\n    import ray", "may import ray"),
        ("jobs/queue.py", "from loramill.serve.api import app", "jobs may not import serve"),
        ("jobs/queue.py", "from ..serve import api", "jobs may not import serve"),
        ("jobs/queue.py", "import loramill.pipelines.nightly", "jobs may not import pipelines"),
        ("jobs/queue.py", "def f():\n    from ray import train", "may import ray"),
        ("serve/api.py", "def f():\n    from loramill.jobs import queue", "serve may not import jobs"),
        ("serve/api.py", "if TYPE_CHECKING:\n    import loramill.jobs.queue", "serve may not import jobs"),
        ("serve/api.py", "import importlib\nimportlib.import_module('loramill.jobs.queue')", "may not import jobs"),
        ("serve/api.py", "class A:\n    async def f(self):\n        import jobs.queue", "write loramill.jobs.queue"),
        ("serve/api.py", "import kernels", "write loramill.kernels"),
        ("serve/api.py", "from pipelines import nightly", "write loramill.pipelines"),
        ("serve/api.py", "from loramill.cli.main import app", "no module imports the command line"),
        ("loramill/client.py", "from loramill import cli", "no module imports the command line"),
        ("pipelines/nightly.py", "import pickle", "unpickles"),
        ("pipelines/nightly.py", "import ray", "may import ray"),
        ("jobs/queue.py", "def f():\n    from pickle import loads", "unpickles"),
        ("kernels/__init__.py", "import ray", "may import ray"),
        ("kernels/reference.py", "from loramill.settings import Settings", "import only"),
        ("kernels/reference.py", "from loramill import settings", "import only"),
        ("kernels/reference.py", "import scipy", "import only"),
        ("kernels/reference.py", "from loramill.serve.engine import engine", "kernels may not import serve"),
        ("serve/engine/engine.py", "import pydantic", "import only"),
        ("serve/engine/engine.py", "from loramill.serve.api import app", "import only"),
        ("serve/engine/engine.py", "from .. import api", "import only"),
        ("serve/model/decoder.py", "def f():\n    import transformers", "import only"),
    ],
)
def test_a_fault_is_found(path: str, source: str, fragment: str) -> None:
    sources = {**SOURCES, "serve/__init__.py": "", "jobs/__init__.py": "", path: source}
    (found,) = faults(sources)
    line = source.count("\n") + 1
    assert found.startswith(f"{path}:{line} imports ")
    assert fragment in found


def test_kernels_and_engine_load_nothing_heavy(tmp_path: Path) -> None:
    """The static rule misses what their parents' `__init__` import; a fresh interpreter doesn't."""
    lean = [module_name(path) for path in tree() if any_match(path, LEAN)]
    heavy = ["ray", "pydantic", "transformers", "peft", "sqlalchemy", "fastapi", "httpx", "typer", "rich"]
    script = f"""
import importlib, sys
for name in {lean!r}:
    importlib.import_module(name)
print(*(name for name in {heavy!r} if name in sys.modules))
"""
    # Not in the tests' folder, whose `loramill` would be a namespace package.
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
