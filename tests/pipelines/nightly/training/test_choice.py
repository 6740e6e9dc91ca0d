"""Which of the versions that were trained from different starts challenges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.pipelines.nightly.training.choice import choose_start
from loramill.types import JobRecord, JobSpec, JobStatus

losses = st.none() | st.floats(0, 10) | st.just(float("nan")) | st.just(float("inf"))


def job(valid_loss: float | None, status: JobStatus = JobStatus.SUCCEEDED) -> JobRecord:
    spec = JobSpec(base="0" * 64, adapter="acme/a", train="file", steps=1, batch_size=8)
    return JobRecord.model_construct(id="job", spec=spec, status=status, valid_loss=valid_loss)


def test_the_lower_validation_loss_challenges_and_the_reason_has_both() -> None:
    choice = choose_start({"champion": job(0.5), "fresh": job(0.25)})
    assert choice is not None and choice.start == "fresh"
    assert choice.reason == (
        "Trained from new weights: the validation loss is 0.5 from the champion and 0.25 from new weights."
    )


@given(losses, losses)
def test_the_order_of_the_jobs_changes_nothing(first: float | None, second: float | None) -> None:
    choice = choose_start({"champion": job(first), "fresh": job(second)})
    assert choice == choose_start({"fresh": job(second), "champion": job(first)})
    known = [each for each in (first, second) if each is not None and each == each and each != float("inf")]
    assert choice is not None
    if second is not None and known and second == min(known) and second != first:
        assert choice.start == "fresh"
    else:
        assert choice.start == "champion"


@pytest.mark.parametrize(("status", "end"), [(JobStatus.FAILED, "failed"), (JobStatus.CANCELLED, "was cancelled")])
def test_a_job_that_did_not_succeed_is_not_chosen(status: JobStatus, end: str) -> None:
    choice = choose_start({"champion": job(0.1, status), "fresh": job(0.9)})
    assert choice is not None and choice.start == "fresh"
    assert choice.reason == f"Trained from new weights: the job from the champion {end}."
    assert choose_start({"champion": job(0.1, status), "fresh": job(0.2, status)}) is None


def test_one_job_is_no_choice() -> None:
    choice = choose_start({"fresh": job(None)})
    assert choice is not None and (choice.start, choice.reason) == ("fresh", "")
