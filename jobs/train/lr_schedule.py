"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from loramill.types import JobSpec


def learning_rate(spec: JobSpec, step: int) -> float:
    """Returns the rate of step `step`, from 0: linear warm-up, then the spec's schedule; no step has the rate zero.

    After the warm-up, with x from 1 at the first step down to 1 / steps at the last: `linear` x, `cosine`
    (1 - cos(pi x)) / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5, without restarts), `constant` 1.
    """
    warmup = round(spec.warmup_ratio * spec.steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / (warmup + 1)
    left = (spec.steps - step) / (spec.steps - warmup)
    match spec.schedule:
        case "linear":
            return spec.learning_rate * left
        case "cosine":
            return spec.learning_rate * (1 - math.cos(math.pi * left)) / 2
        case "constant":
            return spec.learning_rate
