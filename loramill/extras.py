"""The extras of loramill that install optional packages."""

from __future__ import annotations

#: Extra of loramill that installs a package; the extra `local` installs all others.
EXTRAS = {
    "datasets": "data",
    "deepspeed": "full",
    "matplotlib": "plot",
    "openai": "openai",
    "plotext": "plot",
    "pyarrow": "data",
}


def install_command(package: str) -> str:
    """Returns the command that installs the extra that a package belongs to."""
    return f"pip install 'loramill[{EXTRAS.get(package, 'local')}]'"
