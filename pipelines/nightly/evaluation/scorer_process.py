"""Runs a user's scorer in a process of its own: `python scorer_process.py TARGET`, with nothing but Python's library.

Standard input has a line of JSON per answer, with `question`, `reference` and `answer`; standard output gets a line for
each, with `score` or `error`, and ends after the first error. What the scorer prints goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(target: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `folder/file.py:function` names."""
    where, _, name = target.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)  # type: ignore[no-any-return]
    spec = importlib.util.spec_from_file_location("loramill_scorer", where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def score(function: Callable[..., Any], item: dict[str, Any]) -> dict[str, Any]:
    """The score of one answer, or why there is none."""
    found = function(item["question"], item["reference"], item["answer"])
    if hasattr(found, "item"):  # of NumPy or torch, whose float32 and bool_ Python does not count as numbers
        found = found.item()
    if not isinstance(found, int | float) or not math.isfinite(found) or not 0 <= found <= 1:
        return {"error": f"it returned {found!r:.100}, which is not a number from 0 to 1"}
    return {"score": float(found)}


def main(target: str) -> None:
    """Scores what standard input has."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    function: Callable[..., Any] | None = None
    for line in sys.stdin.buffer:
        try:
            function = function or load_function(target)
            result = score(function, json.loads(line))
        except (Exception, SystemExit) as error:
            logging.exception("the scorer failed")
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            result = {"error": f"{type(error).__name__}: {error} ({where})"}
        output.write(json.dumps(result) + "\n")
        output.flush()
        if "error" in result:
            break


if __name__ == "__main__":
    main(sys.argv[1])
