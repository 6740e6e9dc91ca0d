"""The only reader of adapters in PEFT's format: for serving, generation, merging, import, and continued training.

It is strict where PEFT only warns: each tensor that `adapter_config.json` and the base require must be present, finite
and of the right shape, and each tensor in the file must be used. Imports with torch alone.
"""

from loramill.kernels.peft_folder.base import PREFIX, BaseModules, Module, merged_norms
from loramill.kernels.peft_folder.config import CONFIG_FILE
from loramill.kernels.peft_folder.reader import (
    GAINS_FILE,
    WEIGHTS_FILE,
    AdapterModule,
    parse_config,
    read_adapter,
    read_modules,
)
from loramill.kernels.peft_folder.writer import normalized_files

__all__ = [
    "CONFIG_FILE",
    "GAINS_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "AdapterModule",
    "BaseModules",
    "Module",
    "merged_norms",
    "normalized_files",
    "parse_config",
    "read_adapter",
    "read_modules",
]
