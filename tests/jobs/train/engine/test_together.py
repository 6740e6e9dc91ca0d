"""Works that a client of the driver does together."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from loramill.jobs.train.engine import Driver, Together, TrainingEngine, Work

from ..tiny_training import tiny_model


@pytest.fixture(scope="module")
def engine() -> TrainingEngine:
    return TrainingEngine(tiny_model())


def run(driver: Driver[Any]) -> dict[str, Any]:
    ended = {}
    while len(driver):
        ended |= {each.name: each.error or each.value for each in driver.run_pass(5.0)}
    return ended | {each.name: each.error or each.value for each in driver.run_pass(0.0)}


def returned(value: Any) -> Work[Any]:
    return value
    yield


def failed(error: Exception) -> Work[Any]:
    raise error
    yield


def together(*works: Work[Any]) -> Work[list[Any]]:
    outcomes: list[Any] = yield Together(works)
    return outcomes


def test_a_client_gets_the_result_or_error_of_each_work(engine: TrainingEngine) -> None:
    driver, error = Driver[Any](engine, 100), ValueError("bad")
    driver.start("a", "acme", together(returned(1), failed(error), together(returned(2), returned(None))))
    driver.start("b", "acme", returned(3))
    assert run(driver) == {"a": [1, error, [2, None]], "b": 3}


def test_works_wait_for_each_other_and_count_as_one_client(engine: TrainingEngine) -> None:
    driver, arrived = Driver[Any](engine, 100), dict[int, Future[bool]]()
    counts = []

    def arriving(number: int, first: Future[int]) -> Work[int]:
        yield first
        counts.append(len(driver))
        arrived[number] = Future()
        if len(arrived) == 3:
            for index, future in arrived.items():
                future.set_result(index != 1)
        kept = yield arrived[number]
        return number if kept else -1

    futures = [Future[int]() for _ in range(3)]
    driver.start("a", "acme", together(*(arriving(number, future) for number, future in enumerate(futures))))
    assert len(driver) == 1 and driver.run_pass(0.0) == []
    for future in futures:
        assert driver.run_pass(0.0) == []
        future.set_result(0)
    assert run(driver) == {"a": [0, -1, 2]}
    assert set(counts) == {1}


def test_closing_the_driver_closes_works_before_their_client(engine: TrainingEngine) -> None:
    driver, closed = Driver[Any](engine, 100), list[str]()

    def noted(name: str, work: Work[Any]) -> Work[Any]:
        try:
            return (yield from work)
        finally:
            closed.append(name)

    def waiting() -> Work[Any]:
        yield Future()

    driver.start("a", "acme", noted("client", together(noted("first", waiting()), noted("second", waiting()))))
    driver.close()
    assert closed == ["first", "second", "client"] and len(driver) == 0
