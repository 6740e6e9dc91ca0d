"""GPUs that are visible to processes on Ray."""

from __future__ import annotations

#: Environment of every process on Ray. Without it a process that requests no GPU sees all GPUs of its node, and torch,
#: transformers, bitsandbytes and DeepSpeed use any GPU that they see (Ray 2.60, `ray._private.utils`).
ONLY_ASSIGNED_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
