"""The scheduler by itself: numbers in, plans out."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.serve.engine.scheduling.scheduler import Scheduler
from loramill.serve.engine.scheduling.sequence import RunningSequence

fresh = itertools.count(1000)


def scheduler(blocks=100, block_size=4, budget=8, sequences=4, **more) -> Scheduler:
    return Scheduler(blocks, block_size, budget, sequences, **more)


def sequence(id_, tenant="t", version=None, known=1, **more) -> RunningSequence:
    """A sequence of unique tokens, so that none is found in the prefix cache."""
    return RunningSequence(id_, tenant, version, [next(fresh) for _ in range(known)], **more)


def always(version: str | None) -> bool:
    return True


def chunks(plan) -> list[tuple[int, int, int, bool]]:
    return [(chunk.id, chunk.start, chunk.count, chunk.sampled) for chunk in plan.chunks]


def run(s: Scheduler, ready=always):
    """One step as the engine runs it: each sampled sequence gets a token."""
    plan = s.schedule(ready)
    s.commit(plan)
    for chunk in plan.chunks:
        if chunk.sampled:
            s.get(chunk.id).tokens.append(next(fresh))
    s.check_integrity()
    return plan


def test_decode_comes_first_and_prompts_share_the_rest():
    s = scheduler()
    s.add(sequence("a", known=3))
    s.add(sequence("b", known=20))
    assert chunks(run(s)) == [("a", 0, 3, True), ("b", 0, 5, False)]
    s.add(sequence("c", known=2))
    assert chunks(run(s)) == [("a", 3, 1, True), ("b", 5, 7, False)]
    assert chunks(run(s)) == [("a", 4, 1, True), ("b", 12, 7, False)]
    assert chunks(run(s)) == [("a", 5, 1, True), ("b", 19, 1, True), ("c", 0, 2, True)]
    assert chunks(run(s)) == [("a", 6, 1, True), ("b", 20, 1, True), ("c", 2, 1, True)]


def test_a_decode_behind_a_long_prompt_is_not_delayed():
    s = scheduler(budget=6)
    s.add(sequence("short", known=5))
    s.add(sequence("long", known=40))
    run(s)
    assert chunks(run(s)) == [("short", 5, 1, True), ("long", 1, 5, False)]


def test_tenants_take_turns_and_unready_versions_are_skipped():
    s = scheduler(sequences=10, budget=100)
    for id_, tenant, version in [("a1", "a", "cold"), ("a2", "a", None), ("a3", "a", None), ("b1", "b", None)]:
        s.add(sequence(id_, tenant, version))
    assert s.schedule(lambda version: version != "cold").admitted == ("a2", "b1", "a3")
    assert s.waiting == 1
    assert s.schedule(always).admitted == ("a1",)


def test_the_tenant_that_was_served_less_goes_first():
    s = scheduler(sequences=1, budget=100)
    s.add(sequence("long", "a", known=50))
    for number in range(8):
        s.add(sequence(f"short {number}", "b", known=10))
    s.add(sequence("next", "a", known=50))
    order = []
    for _ in range(10):
        order += run(s).admitted
        s.remove(s.running[0].id)
    assert order == ["long", *(f"short {number}" for number in range(5)), "next", *(f"short {n}" for n in (5, 6, 7))]


def test_an_absent_tenant_accumulates_no_credit():
    s = scheduler(blocks=1000, block_size=16, sequences=1, budget=10_000)
    s.add(sequence("a", "a", known=9000))
    run(s)
    for number in range(12):
        s.add(sequence(f"b{number}", "b", known=100))
        s.add(sequence(f"a{number}", "a", known=100))
    s.remove("a")
    order = []
    for _ in range(20):
        order += run(s).admitted
        s.remove(s.running[0].id)
    # Not 90 of b's first: b is ahead only by a newcomer's credit, and then they take turns.
    owners = "".join(id_[0] for id_ in order)
    assert owners.startswith("b" * 5)
    assert "aa" not in owners[:18] and "bb" not in owners[6:]


def test_a_full_batch_makes_room_for_a_tenant_that_runs_nothing():
    s = scheduler(sequences=4, budget=100)
    for number in range(6):
        s.add(sequence(f"flood {number}", "flood", known=4))
    run(s)
    s.add(sequence("other", "quiet", known=4))
    plan = run(s)
    assert plan.preempted == ("flood 3",)
    assert plan.admitted == ("other",)
    for number in range(2, 5):
        s.add(sequence(f"other {number}", "quiet", known=4))
    for _ in range(12):
        run(s)
    # Two each: no tenant takes more than its share.
    assert [other.tenant for other in s.running] == ["flood", "flood", "quiet", "quiet"]


def test_a_new_tenant_goes_before_the_rest_of_a_long_prompt():
    s = scheduler(budget=8)
    s.add(sequence("long", "flood", known=40))
    run(s)
    s.add(sequence("short", "quiet", known=6))
    assert chunks(run(s)) == [("short", 0, 6, True), ("long", 8, 2, False)]


def test_higher_priority_goes_first_and_preempts():
    s = scheduler(sequences=2, budget=100)
    s.add(sequence("low", known=4, priority=-1))
    s.add(sequence("low too", known=4, priority=-1))
    s.add(sequence("normal", "u", known=4))
    s.add(sequence("high", known=4, priority=5))
    assert run(s).admitted == ("high", "normal")
    s.add(sequence("higher", known=4, priority=6))
    plan = run(s)
    assert (plan.preempted, plan.admitted) == (("normal",), ("higher",))
    s.remove("high")
    s.remove("higher")
    assert run(s).admitted == ("normal", "low")


def test_no_sequence_overtakes_one_that_lacks_blocks():
    s = scheduler(blocks=4)
    s.add(sequence("a", known=8))
    s.add(sequence("large", known=12))
    s.add(sequence("small", known=1))
    assert s.schedule(always).admitted == ("a",)
    s.remove("a")
    assert s.schedule(always).admitted == ("large",)


def test_the_last_admitted_is_preempted_first_and_readmitted_first():
    s = scheduler(blocks=4, budget=100)
    s.add(sequence("first", known=8))
    s.add(sequence("second", known=8))
    run(s)
    s.add(sequence("third", known=1))
    plan = run(s)
    assert plan.preempted == ("second",)
    assert plan.admitted == ()
    assert chunks(plan) == [("first", 8, 1, True)]
    assert not s.get("second").block_table
    s.remove("first")
    plan = run(s)
    assert plan.admitted == ("second", "third")
    # The first had reused the last block that the second left in the cache.
    assert chunks(plan)[0] == ("second", 4, 5, True)


def test_preempted_sequences_return_in_their_order_of_admission():
    s = scheduler(blocks=4, budget=100)
    for id_ in "abcd":
        s.add(sequence(id_, known=4))
    run(s)
    plan = run(s)
    assert plan.preempted == ("d", "c")
    s.remove("a")
    s.remove("b")
    assert s.schedule(always).admitted == ("c", "d")


def test_a_prefix_is_computed_once_per_version():
    s = scheduler(budget=100, sequences=10)
    tokens = list(range(20))
    for id_, version in [("base", None), ("v", "v"), ("v too", "v"), ("w", "w")]:
        s.add(RunningSequence(id_, id_, version, list(tokens)))
    # "v too" waits for the blocks that "v" is about to fill.
    assert chunks(run(s)) == [("base", 0, 20, True), ("v", 0, 20, True), ("w", 0, 20, True)]
    plan = run(s)
    # Of 20 known tokens at least one is computed, so the last full block can't be shared.
    assert ("v too", 16, 4, True) in chunks(plan)
    assert s.reused_tokens == 16
    assert s.get("v too").block_table[:4] == s.get("v").block_table[:4]
    assert not set(s.get("v").block_table) & set(s.get("w").block_table)
    # A conversation continues: the answer's blocks are cached, too.
    s.get("v").tokens += [77] * 8
    longer = [*s.get("v").tokens]
    while s.get("v").computed_tokens < len(longer):
        run(s)
    s.remove("v")
    s.add(RunningSequence("next turn", "v", "v", [*longer, 5, 6]))
    reused = s.reused_tokens
    run(s)
    assert s.reused_tokens - reused == len(longer) // 4 * 4


def test_without_the_prefix_cache_nothing_is_shared():
    s = scheduler(budget=100, sequences=10)
    tokens = list(range(20))
    for id_ in ("a", "b"):
        s.add(RunningSequence(id_, "t", None, list(tokens), use_prefix_cache=False))
    assert chunks(run(s)) == [("a", 0, 20, True), ("b", 0, 20, True)]


def test_the_rank_budget_holds_and_no_sequence_starves():
    ranks = {"v": 16, "w": 16, "x": 8, "huge": 64}
    s = scheduler(budget=100, sequences=10, rank_budget=30, rank_of=ranks.__getitem__)
    for id_, version in [("v1", "v"), ("w1", "w"), ("x1", "x"), ("v2", "v"), ("none", None)]:
        s.add(sequence(id_, version=version, tenant=id_))
    assert set(run(s).admitted) == {"v1", "x1", "v2", "none"}
    alone = scheduler(budget=100, sequences=10, rank_budget=30, rank_of=ranks.__getitem__)
    alone.add(sequence("huge", version="huge"))
    assert run(alone).admitted == ("huge",)
    # Sequences of a running version keep arriving, yet the one that doesn't fit is admitted.
    arrived = 0
    while "w1" not in [other.id for other in s.running]:
        arrived += 1
        assert arrived < 1000
        s.add(sequence(f"more {arrived}", version="v", tenant="v"))
        for running in s.running:
            if len(running.tokens) > 4:
                s.remove(running.id)
        run(s)


@settings(max_examples=150)
@given(
    blocks=st.integers(4, 14),
    block_size=st.integers(1, 5),
    budget=st.integers(1, 12),
    sequences=st.integers(1, 6),
    rank_budget=st.sampled_from([None, 4, 8]),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 12),
            st.integers(1, 60),
            st.integers(1, 20),
            st.sampled_from("abc"),
            st.sampled_from([None, "v", "w", "x"]),
            st.sampled_from([0, 0, 0, 1]),
            st.booleans(),
        ),
        max_size=14,
    ),
)
def test_every_sequence_gets_every_token_once(blocks, block_size, budget, sequences, rank_budget, arrivals):
    s = Scheduler(blocks, block_size, budget, sequences, rank_budget=rank_budget, rank_of=lambda version: 4)
    capacity = blocks * block_size
    left: dict[int, int] = {}
    held: dict[int, list] = {}
    for step in range(5000):
        for number, (when, prompt, answer, tenant, version, priority, alike) in enumerate(arrivals):
            if when == step:
                known = min(prompt, capacity)
                tokens = list(range(known)) if alike else [next(fresh) for _ in range(known)]
                left[number] = min(answer, capacity + 1 - known)
                s.add(RunningSequence(number, tenant, version, tokens, priority))
        before = {other.id: other.computed_tokens for other in s.sequences}
        plan = s.schedule(always)
        s.check_integrity()
        assert sum(chunk.count for chunk in plan.chunks) <= budget
        assert len(s.running) <= sequences
        versions = {other.version for other in s.running} - {None}
        assert rank_budget is None or len(versions) <= max(1, rank_budget // 4)
        for chunk in plan.chunks:
            its = s.get(chunk.id)
            # A block that is written has one holder, and positions come one after the other.
            first = chunk.start // block_size
            for index in range(first, -(-(chunk.start + chunk.count) // block_size)):
                assert sum(its.block_table[index] in other.block_table for other in s.running) == 1
            if chunk.id not in plan.admitted and chunk.id not in plan.preempted:
                assert chunk.start == before[chunk.id], "a position skipped or computed twice"
            # A block taken from the cache was computed for the same tokens of the same version.
            for index, block in enumerate(its.block_table[:first]):
                content = (its.version, tuple(its.tokens[: (index + 1) * block_size]))
                assert held.get(block, content) == content
        s.commit(plan)
        for chunk in plan.chunks:
            its = s.get(chunk.id)
            for index in range(its.computed_tokens // block_size):
                held[its.block_table[index]] = (its.version, tuple(its.tokens[: (index + 1) * block_size]))
            if chunk.sampled:
                left[chunk.id] -= 1
                if left[chunk.id]:
                    its.tokens.append(7)
                else:
                    s.remove(chunk.id)
        if step >= 12 and not any(left.values()):
            break
        assert plan.chunks or step <= 12, "no sequence makes progress"
    assert not any(left.values())
    assert s.free_blocks == blocks
    assert s.waiting == 0
