"""Random arrivals, cancellations, shortages and failing loads: answers are right or typed errors, invariants hold."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import ModelNotFound, Overloaded
from loramill.serve.engine import FinishReason

SMALL = {
    "max_batch_tokens": st.integers(2, 60),
    "max_sequences": st.integers(1, 6),
    "kv_tokens": st.integers(128, 320),
    "block_size": st.sampled_from([16, 32]),
    "prefix_cache": st.booleans(),
    "adapter_slots": st.integers(1, 4),
    "adapter_bytes": st.sampled_from([31_488, 1 << 20]),
    "host_bytes": st.sampled_from([0, 40_000]),
    "rank_budget": st.sampled_from([8, 1024]),
    "max_waiting": st.integers(2, 12),
    "load_threads": st.integers(1, 2),
    "slot_patience_steps": st.integers(1, 10),
}
VERSIONS = [None, "lora", "all", "rslora", "patterns", "dora", "one layer", "nowhere"]
EVENT = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(VERSIONS), st.integers(1, 12)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
)


@settings(max_examples=60)
@given(config=st.fixed_dictionaries(SMALL), events=st.lists(EVENT, max_size=40), flaky=st.sets(st.integers(0, 8)))
def test_random_traffic(new_driver, adapters, prompts, expected, config, events, flaky):
    loads = []

    def source(version):
        loads.append(version)
        if len(loads) in flaky or version not in adapters:
            raise ModelNotFound(f"no {version} today")
        return adapters[version]

    driver = new_driver(source, **config)
    wanted = {}
    cancelled = set()
    try:
        for kind, what, count in events:
            if kind == "submit":
                id_ = str(len(wanted))
                wanted[id_] = (what, count)
                try:
                    prompt = prompts.get(what, [1, 2])
                    priority = len(wanted) % 4 // 3
                    driver.submit(id_, prompt, what, f"t{len(wanted) % 3}", priority, max_tokens=count)
                except Overloaded:
                    del wanted[id_]
            elif kind == "cancel":
                cancelled.add(str(what))
                driver.engine.cancel(str(what))
            else:
                for _ in range(what):
                    driver.step()
        driver.finish()
        driver.engine.check_integrity()
    finally:
        driver.engine.close()
    for id_, (version, count) in wanted.items():
        answer = driver.answers[id_]
        if answer.last.finish_reason == FinishReason.ERROR:
            # It can't be loaded, or it left the full queue for another tenant's request.
            failed = version is not None and isinstance(answer.last.error, ModelNotFound)
            assert failed or isinstance(answer.last.error, Overloaded)
            assert answer.tokens == []
            continue
        assert version != "nowhere" or answer.last.finish_reason == FinishReason.CANCELLED
        full = expected.get(str(version), [])[:count]
        if answer.last.finish_reason == FinishReason.CANCELLED:
            assert id_ in cancelled
            assert answer.tokens == full[: len(answer.tokens)]
        else:
            assert (answer.last.finish_reason, answer.tokens) == (FinishReason.LENGTH, full)
