"""Bases from a model hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loramill.models.catalog import find_base

from .conftest import python


def test_an_unreachable_hub_is_reported_in_one_line(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from loramill.errors import BaseUnusable\n"
        "from loramill.models.catalog import find_base\n"
        f"try: find_base('owner/model', Path({str(tmp_path)!r}))\n"
        "except BaseUnusable as error: print(error)"
    )
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        output, noise = python(code, HF_HOME=str(tmp_path), **environment).communicate()
        assert "no model hub could be reached" in output
        assert output.count("\n") == 1
        assert noise == ""


def test_a_hub_model_is_downloaded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[bool] = []
    stored = tmp_path / "snapshots" / "0123"

    def download(repo: str, *, local_files_only: bool = False, **_: object) -> str:
        calls.append(local_files_only)
        if local_files_only and not stored.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(shutil.copytree(folder, stored, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    first = find_base("Owner/Model-1B", tmp_path / "cache")
    assert (first.name, first.folder) == ("model-1b", stored)
    assert find_base("Owner/Model-1B", tmp_path / "cache") == first
    assert calls == [True, False, True]
