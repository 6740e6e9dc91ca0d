"""Private APIs of libraries: each is used in one module and has not changed since that module was written.

A module that uses a private API is listed in `PRIVATE_APIS`, with the version of the library that it was written for
and, per private object, a digest of the object's source in that version. An upgrade that changes none of these sources
passes; any other fails here and names what to read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("loramill", "kernels", "jobs", "serve", "pipelines")


@dataclass(frozen=True)
class PrivateApi:
    """The part of a library's private API that one module uses.

    Attributes:
        module: the one module that uses it.
        version: the library's version that the module was written for.
        objects: digests of the objects' sources in that version, by module and name.
        names: what the module's source may contain: imports, attributes and keyword arguments.
    """

    library: str
    module: str
    version: str
    objects: Mapping[str, str]
    names: frozenset[str]


PRIVATE_APIS = (
    PrivateApi(
        library="prometheus_client",
        module="serve/metrics/prometheus_private.py",
        version="0.26.0",
        objects={
            "prometheus_client.metrics:Histogram._metric_init": "07b05f83f5bc",
            "prometheus_client.metrics:Histogram.observe": "b85548cbd469",
            "prometheus_client.mmap_dict:MmapedDict": "ff2ca0acfa51",
        },
        names=frozenset({"prometheus_client.mmap_dict.MmapedDict", "_buckets", "_sum"}),
    ),
    PrivateApi(
        library="ray",
        module="serve/ray_private.py",
        version="2.60.0",
        objects={
            "ray.serve.handle:DeploymentHandle.options": "d11c7606f67d",
            "ray.serve.request_router:RequestRouter._choose_replica_for_request": "b3b623f34204",
        },
        names=frozenset({"_by_reference", "_choose_replica_for_request"}),
    ),
    PrivateApi(
        library="ray",
        module="pipelines/cluster/deploy.py",
        version="2.60.0",
        objects={"ray._private.worker:init": "26051a72be23"},
        names=frozenset({"_plasma_directory"}),
    ),
    PrivateApi(
        library="ray",
        module="jobs/ray/lean_trainer.py",
        version="2.60.0",
        objects={
            "ray.train.v2._internal.callbacks.datasets:DatasetsCallback": "327420dda318",
            "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback": "a8dc88141e22",
            "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks": "00a45d7c799b",
            "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy": "d443527d2a25",
            "ray.train.v2._internal.execution.scaling_policy.scaling_policy"
            ":ScalingPolicy.after_controller_start": "4be41d23183c",
            "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller": "4592316f87cb",
        },
        names=frozenset(
            {
                "ray.train.v2._internal.callbacks.datasets.DatasetsCallback",
                "ray.train.v2._internal.callbacks.placement_group_callback.PlacementGroupCleanerCallback",
                "ray.train.v2._internal.execution.scaling_policy.FixedScalingPolicy",
                "_create_default_callbacks",
                "_initialize_and_run_controller",
            }
        ),
    ),
    PrivateApi(
        library="ray",
        module="jobs/ray/orphans.py",
        version="2.60.0",
        objects={
            "ray._private.state:GlobalState._connect_and_get_accessor": "2ce7d8b51560",
            "ray._private.state:GlobalState.placement_group_table": "6c3d6e900094",
        },
        names=frozenset({"ray._private.state.state", "_connect_and_get_accessor"}),
    ),
    PrivateApi(
        library="deepspeed",
        module="jobs/train/deepspeed.py",
        version="0.19.8",
        objects={
            "deepspeed.runtime.zero.stage_1_and_2"
            ":DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state": "99f3d15d8f25",
        },
        names=frozenset({"_lazy_init_hp_params_optimizer_state"}),
    ),
)

#: Undocumented modules of the libraries, whose names look public.
UNDOCUMENTED = ("prometheus_client.mmap_dict",)
LIBRARIES = frozenset(api.library for api in PRIVATE_APIS)


def private_names(source: str, own: frozenset[str] = frozenset()) -> set[str]:
    """The private names of `LIBRARIES` that a module uses: imports, attributes, keyword arguments.

    Args:
        own: private attributes that the project itself defines.
    """
    tree = ast.parse(source)
    imports = {name for node in ast.walk(tree) for name in _imported(node)}
    if not any(name.partition(".")[0] in LIBRARIES for name in imports):
        return set()
    found = {
        name
        for name in imports
        if name.partition(".")[0] in LIBRARIES
        and (any(map(is_private, name.split("."))) or name.startswith(UNDOCUMENTED))
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name) if is_private(name):
                found.add(name)
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                found.add(name)
            case ast.Call(keywords=keywords):
                found |= {each.arg for each in keywords if each.arg and is_private(each.arg)}
            case ast.Dict(keys=keys):  # arguments that are given conditionally
                found |= {key.value for key in keys if isinstance(key, ast.Constant) and is_private(str(key.value))}
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_", "_replace", "_asdict")


def _imported(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            yield from (f"{module}.{alias.name}" for alias in names)


def defined_private(source: str) -> set[str]:
    """Private attributes that a source defines: methods, functions, class and instance attributes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
    return {name for name in found if is_private(name)}


def sources() -> dict[str, str]:
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def resolve(name: str) -> object:
    module, _, path = name.partition(":")
    return reduce(getattr, path.split("."), importlib.import_module(module))


def digest(found: object) -> str:
    source = inspect.getsource(found)  # type: ignore[arg-type]
    return hashlib.sha256(inspect.cleandoc("\n" + source).encode()).hexdigest()[:12]


def fault(api: PrivateApi, name: str, expected: str) -> str | None:
    """Returns what to do if a private object has changed, else None."""
    installed = metadata.version(api.library)
    task = f"Read what has changed, adapt {api.module}, and record version {installed} and the digest here."
    try:
        found = digest(resolve(name))
    except (ImportError, AttributeError):
        return (
            f"{api.library} {installed} has no {name}; {api.module} was written for {api.version}, which has it. {task}"
        )
    if found != expected:
        return (
            f"{name} of {api.library} {installed} (digest {found}) is not what it was in {api.version} (digest "
            f"{expected}), for which {api.module} was written. {task}"
        )
    return None


@pytest.mark.parametrize(
    ("api", "name"),
    [(api, name) for api in PRIVATE_APIS for name in api.objects],
    ids=lambda value: value if isinstance(value, str) else value.module,
)
def test_private_apis_have_not_changed(api: PrivateApi, name: str) -> None:
    assert fault(api, name, api.objects[name]) is None


def test_each_private_name_is_used_only_in_its_module() -> None:
    tree = sources()
    own = frozenset().union(*map(defined_private, tree.values()))
    used = {path: names for path, source in tree.items() if (names := private_names(source, own))}
    expected: dict[str, set[str]] = {}
    for api in PRIVATE_APIS:
        expected.setdefault(api.module, set()).update(api.names)
    assert used == expected


USES = {
    "a private module": ("from ray._private.state import state\n", {"ray._private.state.state"}),
    "an undocumented module": (
        "from prometheus_client.mmap_dict import MmapedDict\n",
        {"prometheus_client.mmap_dict.MmapedDict"},
    ),
    "an attribute": ("import ray\nray.x()._connect()\n", {"_connect"}),
    "an argument": ("import ray\nray.init(_plasma_directory='x')\n", {"_plasma_directory"}),
    "an optional argument": ("import ray\nray.init(**{'_plasma_directory': 'x'})\n", {"_plasma_directory"}),
    "an overridden method": (
        "from ray.serve import R\nclass A(R):\n    def _choose(self):\n        return super()._choose()\n",
        {"_choose"},
    ),
    "an own attribute": ("import ray\nclass A:\n    def f(self):\n        self._own = 1\n        self._own\n", set()),
    "no library": ("import os\nos._exit(1)\n", set()),
}


@pytest.mark.parametrize("source, expected", USES.values(), ids=USES)
def test_uses_of_private_names_are_found(source: str, expected: set[str]) -> None:
    assert private_names(source, frozenset(defined_private(source))) == expected


def changed() -> None:
    """An object whose source is not the recorded one."""


def test_a_changed_or_missing_object_is_named_with_what_to_do() -> None:
    api = PrivateApi("ray", "jobs/ray/x.py", "1.0", {}, frozenset())
    module = sys.modules[__name__].__name__
    assert fault(api, f"{module}:changed", digest(changed)) is None
    message = fault(api, f"{module}:changed", "000000000000")
    assert message is not None and digest(changed) in message and "jobs/ray/x.py was written" in message
    message = fault(api, f"{module}:gone", "000000000000")
    assert message is not None and f"has no {module}:gone" in message and "adapt jobs/ray/x.py" in message
