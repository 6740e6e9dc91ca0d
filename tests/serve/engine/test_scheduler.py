"""The scheduler by itself: numbers in, plans out."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.serve.engine.scheduler import Scheduler, Sequence


def scheduler(blocks=100, block_size=4, budget=8, sequences=4) -> Scheduler:
    return Scheduler(blocks, block_size, budget, sequences)


def always(version: str | None) -> bool:
    return True


def shares(plan) -> list[tuple[str, int, int, bool]]:
    return [(share.id, share.start, share.count, share.sampled) for share in plan.shares]


def run(s: Scheduler, ready=always):
    """One step as an engine does it: whoever was sampled gets a token."""
    plan = s.plan(ready)
    s.commit(plan)
    for share in plan.shares:
        if share.sampled:
            s.extend(share.id)
    s.check_integrity()
    return plan


def test_decode_comes_first_and_prompts_share_what_is_left():
    s = scheduler()
    s.add(Sequence("a", "t", None, known=3))
    s.add(Sequence("b", "t", None, known=20))
    assert shares(run(s)) == [("a", 0, 3, True), ("b", 0, 5, False)]
    s.add(Sequence("c", "t", None, known=2))
    assert shares(run(s)) == [("a", 3, 1, True), ("b", 5, 7, False)]
    assert shares(run(s)) == [("a", 4, 1, True), ("b", 12, 7, False)]
    assert shares(run(s)) == [("a", 5, 1, True), ("b", 19, 1, True), ("c", 0, 2, True)]
    assert shares(run(s)) == [("a", 6, 1, True), ("b", 20, 1, True), ("c", 2, 1, True)]


def test_a_decode_behind_a_long_prompt_is_not_held_up():
    s = scheduler(budget=6)
    s.add(Sequence("short", "t", None, known=5))
    s.add(Sequence("long", "t", None, known=40))
    run(s)
    assert shares(run(s)) == [("short", 5, 1, True), ("long", 1, 5, False)]


def test_tenants_take_turns_and_unready_versions_are_passed_over():
    s = scheduler(sequences=10, budget=100)
    for id_, tenant, version in [("a1", "a", "cold"), ("a2", "a", None), ("a3", "a", None), ("b1", "b", None)]:
        s.add(Sequence(id_, tenant, version, known=1))
    assert s.plan(lambda version: version != "cold").admitted == ("a2", "b1", "a3")
    assert s.waiting == 1
    assert s.plan(always).admitted == ("a1",)


def test_no_newcomer_jumps_over_one_that_lacks_blocks():
    s = scheduler(blocks=4)
    s.add(Sequence("a", "t", None, known=8))
    s.add(Sequence("large", "t", None, known=12))
    s.add(Sequence("small", "u", None, known=1))
    s.add(Sequence("small too", "t", None, known=1))
    assert s.plan(always).admitted == ("a",)
    s.remove("a")
    assert s.plan(always).admitted[:2] == ("small", "large")


def test_the_last_admitted_gives_way_and_comes_back_first():
    s = scheduler(blocks=4, budget=100)
    s.add(Sequence("first", "t", None, known=8))
    s.add(Sequence("second", "t", None, known=8))
    run(s)
    s.add(Sequence("third", "u", None, known=1))
    plan = run(s)
    assert plan.preempted == ("second",)
    assert plan.admitted == ()
    assert shares(plan) == [("first", 8, 1, True)]
    assert s.get("second").blocks == []
    s.remove("first")
    plan = run(s)
    assert plan.admitted == ("second", "third")
    assert shares(plan)[0] == ("second", 0, 9, True)


def test_the_preempted_come_back_in_the_order_they_were_admitted():
    s = scheduler(blocks=4, budget=100)
    for id_ in "abcd":
        s.add(Sequence(id_, "t", None, known=4))
    run(s)
    plan = run(s)
    assert plan.preempted == ("d", "c")
    s.remove("a")
    s.remove("b")
    assert s.plan(always).admitted == ("c", "d")


@settings(deadline=None, max_examples=150)
@given(
    blocks=st.integers(4, 14),
    block_size=st.integers(1, 5),
    budget=st.integers(1, 12),
    sequences=st.integers(1, 6),
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 60), st.integers(1, 20), st.sampled_from("abc")), max_size=14
    ),
)
def test_everyone_gets_every_token_once(blocks, block_size, budget, sequences, arrivals):
    s = Scheduler(blocks, block_size, budget, sequences)
    room = blocks * block_size
    todo = [
        (when, f"{i}", min(prompt, room), tenant, min(answer, room + 1 - min(prompt, room)))
        for i, (when, prompt, answer, tenant) in enumerate(arrivals)
    ]
    left = {id_: answer for _, id_, _, _, answer in todo}
    computed: dict[str, int] = {}
    for step in range(5000):
        for when, id_, prompt, tenant, _ in todo:
            if when == step:
                s.add(Sequence(id_, tenant, None, known=prompt))
        plan = s.plan(always)
        s.check_integrity()
        assert sum(share.count for share in plan.shares) <= budget
        assert len(s.running) <= sequences
        owned = [block for sequence in s.running for block in sequence.blocks]
        assert len(set(owned)) == len(owned)
        for id_ in plan.preempted:
            computed[id_] = 0
        for share in plan.shares:
            assert share.start == computed.get(share.id, 0), "a position skipped or computed twice"
            computed[share.id] = share.start + share.count
        s.commit(plan)
        for share in plan.shares:
            if share.sampled:
                left[share.id] -= 1
                if left[share.id]:
                    s.extend(share.id)
                else:
                    s.remove(share.id)
        if not any(left.values()):
            break
        assert plan.shares or step <= 12, "nobody gets on"
    assert not any(left.values())
    assert s.free_blocks == blocks
