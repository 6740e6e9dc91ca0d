import pytest

from loramill.jobs.supervisor import sessions_to_start


@pytest.mark.parametrize(
    ("open_jobs", "alive", "limit", "expected"),
    [(0, 0, 2, 0), (1, 0, 2, 1), (5, 0, 2, 2), (5, 1, 2, 1), (5, 2, 2, 0), (1, 2, 2, 0), (0, 2, 2, 0)],
)
def test_one_session_for_each_open_job_within_the_limit(open_jobs: int, alive: int, limit: int, expected: int) -> None:
    assert sessions_to_start(open_jobs, alive, limit) == expected
