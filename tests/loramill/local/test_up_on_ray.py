"""`loramill up` with a GPU that nvidia-smi and Ray report, and torch does not find: one error, and nothing is left."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from loramill.models.catalog import Base

from .test_up import free_port, one_sentence

#: `loramill up` with a torch that was built for CUDA.
UP = """
from loramill.local import cluster_process, gpus
gpus.torch_cuda_version = lambda: "13.0"
cluster_process.ERROR_GRACE_SECONDS = 0.1
from loramill.cli import app
app(["up"])
"""


def test_a_gpu_that_cant_be_used_is_one_error(base: Base, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0, GPU-0, 81559, 81000, 9.0, 580.82.07, NVIDIA H100 80GB HBM3\n")
    tool.chmod(0o755)
    variables = {
        "LORAMILL_HOME": str(tmp_path / "home"),
        "LORAMILL_BASE": str(base.folder),
        "LORAMILL_SERVE__PORT": str(free_port()),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}',
    }
    ended = subprocess.run(
        [sys.executable, "-c", UP], env=os.environ | variables, capture_output=True, text=True, timeout=240, check=False
    )
    message = one_sentence(ended)
    assert "an engine takes 50% of a GPU, and up to 1 training session 50%" in ended.stdout
    assert "The cluster did not start: torch finds no GPU in this process." in message
    assert "set serve.device to cpu and jobs.use_gpu to false" in message
    for lock in ("up.lock", "run/cluster.lock"):
        with (tmp_path / "home" / lock).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    listing = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listing
