"""One meaning per word: no two public classes of the package share a name.

The exception is a wire object that the API describes and the client reads: the schema and the client's class are the
two ends of one object, so they have one name. `WIRE` lists these, and may hold no name that no longer exists twice.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("loramill", "kernels", "jobs", "serve", "pipelines")
WIRE = {"Adapter", "Checkpoint", "CreatedTenant", "File", "FileCheck", "Job", "PreviewPart"}
#: The two ends of a wire object.
CLIENT, SCHEMAS = "loramill/client/models.py", "serve/api/schemas/"


def public_classes(source: str) -> list[str]:
    """Names of a module's public classes."""
    body = ast.parse(source).body
    return [node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def modules_by_class() -> dict[str, list[str]]:
    """Paths of the modules that define each class name."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for name in public_classes(path.read_text(encoding="utf-8")):
                found[name].append(path.relative_to(ROOT).as_posix())
    return found


def are_wire_ends(paths: list[str]) -> bool:
    """Whether the paths are the client's module and one module of schemas."""
    return len(paths) == 2 and paths[0] == CLIENT and paths[1].startswith(SCHEMAS)


def test_no_two_public_classes_share_a_name() -> None:
    shared = {name: paths for name, paths in modules_by_class().items() if len(paths) > 1}
    allowed = {name for name, paths in shared.items() if name in WIRE and are_wire_ends(paths)}
    assert {name: paths for name, paths in shared.items() if name not in allowed} == {}
    assert allowed == WIRE, "WIRE names classes that exist once"


def test_private_nested_and_other_names_are_not_counted() -> None:
    source = "class A: ...\nclass _B: ...\ndef f():\n    class C: ...\nclass D:\n    class E: ..."
    assert public_classes(source) == ["A", "D"]


def test_only_the_client_and_the_schemas_may_share_a_name() -> None:
    assert are_wire_ends([CLIENT, SCHEMAS + "jobs.py"])
    assert not are_wire_ends(["loramill/data/tokenizer.py", SCHEMAS + "jobs.py"])
    assert not are_wire_ends([CLIENT, SCHEMAS + "jobs.py", "serve/model/protocol.py"])
