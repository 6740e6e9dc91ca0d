"""Makes processes on Ray see only the GPUs that they requested."""

from __future__ import annotations

#: Environment of all that runs on Ray. Without it a process that asks for no GPU sees all of its node's, and torch,
#: transformers, bitsandbytes and DeepSpeed each use what they see (Ray 2.60, `ray._private.utils`).
ONLY_ASSIGNED_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
