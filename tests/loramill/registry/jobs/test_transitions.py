"""The allowed status changes of a job."""

import pytest

from loramill.errors import Conflict
from loramill.registry import jobs
from loramill.registry.jobs import transitions
from loramill.types import JobStatus

PAIRS = [(before, after) for before in JobStatus for after in JobStatus if after is not JobStatus.RUNNING]


def test_every_status_has_its_allowed_changes():
    assert transitions.ALLOWED.keys() == set(JobStatus)
    assert all(status not in allowed for status, allowed in transitions.ALLOWED.items())
    assert transitions.ALLOWED[JobStatus.SUCCEEDED] == frozenset()


def test_a_change_is_made_if_it_is_allowed_and_refused_otherwise(registry, make_spec):
    spec = make_spec()
    with registry.writing() as session:
        for before, after in PAIRS:
            row = transitions.lock_job(session, jobs.submit(session, spec, {}).id)
            row.status = before
            if after in transitions.ALLOWED[before]:
                transitions.stop(session, row, after)
                assert (row.status, row.owner, row.finished_at is not None) == (after, None, after.final)
            else:
                with pytest.raises(Conflict, match=f"is {before} and cannot become {after}"):
                    transitions.stop(session, row, after)
                assert row.status is before
