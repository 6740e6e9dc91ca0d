"""Decides whether a job may join those already in a session."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loramill.sizing.anatomy import Anatomy
from loramill.sizing.passes import Device, MemoryRow, largest_row
from loramill.sizing.targets import trained_elements
from loramill.sizing.tenants import SessionJob, estimate_session
from loramill.types import JobRecord, JobSpec, Quantization


@dataclass(frozen=True, slots=True)
class SessionMemory:
    """The memory of a session.

    Attributes:
        bytes: all that it may take.
        pass_tokens: maximum tokens of a pass with several jobs.
    """

    base: Anatomy
    quantization: Quantization
    device: Device
    bytes: int
    pass_tokens: int

    def fits(self, specs: Collection[JobSpec]) -> bool:
        """Whether these jobs fit together, with examples of any length that their specs allow."""
        trained = [each for spec in specs for each in spec.trained_specs]
        jobs = [SessionJob(spec, trained_elements(spec, self.base), _longest_row(spec)) for spec in trained]
        needed = estimate_session(jobs, self.base, self.quantization, self.device, pass_tokens=self.pass_tokens)
        return needed.bytes <= self.bytes


def may_join(job: JobRecord, others: Collection[JobRecord], memory: SessionMemory | None) -> bool:
    """Whether a job may train next to the others of a session; next to none, it always may.

    Args:
        memory: of the session; None: not known, and not checked.
    """
    if not others:
        return True
    if any(_needs_own_session(each) for each in (job, *others)):
        return False
    return memory is None or memory.fits([each.spec for each in (*others, job)])


def _needs_own_session(job: JobRecord) -> bool:
    return job.alone or job.spec.method == "full"


def _longest_row(spec: JobSpec) -> MemoryRow:
    return largest_row(spec, (spec.max_example_tokens,), 1.0, shared_prefixes=False)
