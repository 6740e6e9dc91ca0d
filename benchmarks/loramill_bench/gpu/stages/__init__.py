"""The stages of the run, in their order."""

from __future__ import annotations

from loramill_bench.gpu.stage import Stage
from loramill_bench.gpu.stages import checks, engine, logits, machine, quantized, tenants, training

#: 9 minutes in all. What is right comes before what is fast, and what compiles kernels comes first of all.
STAGES = (
    Stage("machine", 25, machine.measure),
    Stage("checks", 110, checks.check),
    Stage("kernels", 60, checks.time_kernels),
    Stage("engine", 150, engine.measure),
    Stage("logits", 40, logits.measure),
    Stage("quantized", 30, quantized.measure),
    Stage("training", 100, training.measure),
    Stage("tenants", 25, tenants.measure),
)
