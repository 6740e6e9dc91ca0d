"""`loramill adapters canary`, and what `adapters show` prints of rollouts."""

from __future__ import annotations

import pytest

from loramill.cli.adapters.canary import describe_rollout
from loramill.types import RolloutKind, RolloutOutcome, RolloutState, TrafficCounts, WatchPolicy

from ...conftest import RunningGateway, examples
from ..running import json_output, loramill, use_gateway


@pytest.fixture(autouse=True)
def _with_the_gateway(monkeypatch: pytest.MonkeyPatch, gateway: RunningGateway) -> None:
    use_gateway(monkeypatch, gateway)


def test_a_canary_is_started_changed_shown_and_ended(gateway: RunningGateway, tenant: str) -> None:
    name = f"{tenant}/a"
    with gateway.client() as admin:
        first, second = (gateway.publish(admin.jobs.submit(name, examples(word=word)).id) for word in ("x", "y"))
    started = loramill("adapters", "canary", name, "--share", "0.1").stderr
    assert f"{second[:12]} answers 10% of the requests" in started
    changed = json_output("adapters", "canary", name, "--share", "0.5", "--promote-after", "2h")
    assert (changed["version"], changed["baseline"], changed["share"]) == (second, first, 0.5)
    assert changed["policy"]["window_seconds"] == 7200 and changed["ends_at"] is not None
    larger = json_output("adapters", "canary", name, "--share", "0.6")
    assert (larger["policy"], larger["ends_at"]) == (changed["policy"], changed["ends_at"])
    assert "answers 60% of the requests" in loramill("adapters", "show", name).stdout
    assert "answers all requests" in loramill("adapters", "canary", name, "--end").stderr
    assert "has no canary" in loramill("adapters", "canary", name, "--end").stderr
    shadow = loramill("adapters", "canary", f"{name}@{second[:12]}", "--share", "1", "--shadow").stderr
    assert "answers copies of 100% of the requests" in shadow
    assert loramill("adapters", "canary", name, "--end").exit_code == 0


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("a", (), "give either --share"),
        ("a", ("--share", "0.1", "--end"), "takes no other option"),
        ("a", ("--end", "--shadow"), "takes no other option"),
        ("a", ("--end", "--promote-after", "2h"), "takes no other option"),
        ("a@challenger", ("--end",), "no version"),
        ("a", ("--share", "10"), "between 0 and 1, such as 0.1 for 10%"),
        ("a", ("--share", "nan"), "between 0 and 1"),
        ("a", ("--share", "0.1", "--promote-after", "soon"), "--promote-after"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tenant: str, name: str, options: tuple[str, ...], reason: str
) -> None:
    result = loramill("adapters", "canary", f"{tenant}/{name}", *options)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.replace("│", " ").split())


def test_a_rollout_is_described_with_its_end_and_its_counts() -> None:
    state = RolloutState(
        id=1,
        adapter="acme/a",
        kind=RolloutKind.WATCH,
        version="2" * 64,
        baseline="1" * 64,
        share=1.0,
        run=None,
        policy=WatchPolicy(),
        started_at=0.0,
        ends_at=1.0,
        ended_at=1.0,
        outcome=RolloutOutcome.ROLLED_BACK,
        reason="it is worse",
        tried=TrafficCounts(requests=7, errors=2, cut=1, bad=3),
        compared=TrafficCounts(requests=1),
    )
    text = describe_rollout(state)
    assert text.startswith("watch of 222222222222, rolled back ")
    assert text.endswith(
        ": it is worse; 222222222222 7 requests (2 failed, 1 cut, 3 rated bad); 111111111111 1 request"
    )
