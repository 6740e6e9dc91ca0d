"""The engine on a tiny model: the tokens of transformers and PEFT whatever else happens."""

import threading

import pytest

from loramill.serve.engine import FinishReason
from loramill.serve.model import Decoder

from .conftest import LARGEST


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="together"),
        pytest.param({"max_batch_tokens": 16}, id="chunked"),
        pytest.param({"max_batch_tokens": 3}, id="tiny chunks, few rows"),
        pytest.param({"max_sequences": 1}, id="one after another"),
        pytest.param({"kv_tokens": 160, "max_batch_tokens": 40}, id="preempted"),
        pytest.param({"adapter_slots": 2, "load_threads": 1}, id="fewer slots than adapters"),
        pytest.param({"adapter_slots": 1, "slot_patience_steps": 1}, id="one slot"),
        pytest.param({"adapter_bytes": LARGEST, "slot_patience_steps": 1}, id="memory for the largest adapter only"),
        pytest.param({"host_bytes": 0, "adapter_slots": 1, "max_sequences": 1}, id="no host cache"),
        pytest.param({"rank_budget": 16}, id="few ranks per step"),
        pytest.param({"prefix_cache": False}, id="no prefix cache"),
    ],
)
def test_a_mixed_batch_answers_as_peft_does_alone(drive, prompts, expected, config):
    driver = drive(**config)
    driver.submit_all(prompts)
    assert driver.finish() == expected
    stats = driver.engine.stats
    assert stats.generated_tokens == 12 * len(expected)
    assert stats.loads >= len(expected) - 1


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({}, [[128], [1], [1] * 2, [1] * 4, [1] * 8, [1] * 16, [1] * 32, [1] * 64]),
        ({"max_batch_tokens": 3}, [[3], [1], [1] * 2, [1] * 3]),
        ({"max_sequences": 1}, [[128], [1]]),
        ({"kv_tokens": 80}, [[80], [1], [1] * 2, [1] * 4, [1] * 5]),
    ],
)
def test_warming_up_changes_no_answer(drive, prompts, expected, monkeypatch, config, rows):
    driver, steps = drive(**config), []
    forward = Decoder.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            Decoder, "forward", lambda model, chunks, *rest: steps.append(chunks) or forward(model, chunks, *rest)
        )
        driver.engine.warm_up()
    assert [[len(chunk.tokens) for chunk in chunks] for chunks in steps] == rows
    driver.engine.check_integrity()
    assert driver.engine.stats.steps == driver.engine.stats.computed_tokens == 0
    driver.submit_all({version: tokens for version, tokens in prompts.items() if len(tokens) < 64})
    answers = driver.finish()
    assert answers == {version: expected[version] for version in answers}


def test_blocks_do_run_out_in_the_preempted_case(drive, prompts, expected):
    driver = drive(kv_tokens=160, max_batch_tokens=40)
    driver.warm(*prompts)
    driver.submit_all(prompts)
    assert driver.finish() == expected
    assert driver.engine.stats.preemptions > 0


def test_answers_are_the_same_alone_and_together(drive, prompts, expected):
    driver = drive()
    for version, tokens in prompts.items():
        driver.submit(str(version), tokens, version)
        driver.finish()
    assert {id_: answer.tokens for id_, answer in driver.answers.items()} == expected


def test_a_seed_gives_the_same_tokens_whatever_the_batch(drive, prompts):
    sampling = {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "seed": 5, "max_tokens": 20}
    alone = drive()
    alone.submit("it", prompts["all"], "all", **sampling)
    tokens = alone.finish()["it"]
    crowd = drive(max_batch_tokens=20, kv_tokens=160)
    crowd.warm(*prompts)
    for i, (version, other) in enumerate(prompts.items()):
        crowd.submit(f"other {i}", other[:30], version, temperature=1.0, seed=i)
    crowd.submit("it", prompts["all"], "all", **sampling)
    crowd.submit("another seed", prompts["all"], "all", **{**sampling, "seed": 6})
    answers = crowd.finish()
    assert crowd.engine.stats.preemptions > 0
    assert answers["it"] == tokens
    assert answers["another seed"] != tokens


def test_the_prefix_cache_changes_no_token(drive, prompts, expected):
    driver = drive()
    for round_ in range(2):
        for version, tokens in prompts.items():
            driver.submit(f"{version} {round_}", tokens, version)
        driver.finish()
    stats = driver.engine.stats
    assert stats.reused_tokens == sum((len(tokens) - 1) // 16 * 16 for tokens in prompts.values())
    for id_, answer in driver.answers.items():
        assert answer.tokens == expected[id_[:-2]]


def test_no_version_meets_the_kv_of_another(drive, adapters, prompts, expected):
    # The same folder is served first as one adapter, then, retrained, as another: only the version differs.
    folders = {"monday": adapters["lora"], "tuesday": adapters["all"]}
    driver = drive(lambda version: folders[version])
    prompt = prompts["all"]
    assert len(prompt) > 64
    for version in ("monday", "tuesday", None):
        driver.submit(f"{version}", prompt, version)
        driver.finish()
        assert driver.engine.stats.reused_tokens == 0
    assert driver.answers["tuesday"].tokens == expected["all"]
    assert len({tuple(answer.tokens) for answer in driver.answers.values()}) == 3


def test_n_answers_share_the_prompt_and_have_seeds_of_their_own(drive, prompts):
    driver = drive(kv_tokens=2048)
    prompt = prompts["all"]
    sampling = {"temperature": 1.0, "max_tokens": 8}
    driver.submit("it", prompt, "all", n=4, seed=11, **sampling)
    for index in range(4):
        driver.submit(f"alone {index}", prompt, "all", seed=11 + index, **sampling)
    answers = driver.finish()
    several = [answers[id_] for id_ in ("it", "it/1", "it/2", "it/3")]
    assert several == [answers[f"alone {index}"] for index in range(4)]
    assert len({tuple(tokens) for tokens in several}) == 4
    assert driver.engine.stats.reused_tokens == 7 * ((len(prompt) - 1) // 16 * 16)
    driver.answers.clear()
    driver.submit("it", prompt, "all", n=3)
    driver.step()
    driver.engine.cancel("it")
    driver.finish()
    assert {answer.last.finish_reason for answer in driver.answers.values()} == {FinishReason.CANCELLED}


def test_penalties_bias_and_min_tokens_reach_the_sampler(drive, prompts, expected):
    driver = drive()
    tokens = expected["None"]
    prompt = prompts[None]
    driver.submit("banned", prompt, logit_bias=((tokens[0], -100.0),))
    driver.submit("wanted", prompt, logit_bias=((42, 100.0),))
    driver.submit("often", prompt, frequency_penalty=50.0)
    driver.submit("stopped late", prompt, stop_ids=(tokens[0],), min_tokens=3)
    answers = driver.finish()
    assert answers["banned"][0] != tokens[0]
    assert answers["wanted"] == [42] * 12
    assert len(set(answers["often"])) == 12
    assert len(answers["stopped late"]) >= 3
    assert tokens[0] not in answers["stopped late"][:3]


@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 7}], ids=["whole", "chunked"])
def test_echo_returns_the_prompt_with_its_log_probabilities(drive, prompts, expected, config, tiny_reference):
    driver = drive(**config)
    prompt = prompts["rslora"]
    driver.submit("echo", prompt, echo=True, logprobs=2, max_tokens=3)
    driver.submit("bare", prompt, echo=True, max_tokens=2)
    driver.submit("alone", prompt, echo=True, logprobs=0, max_tokens=0)
    driver.submit("one token", prompt[:1], echo=True, logprobs=1, max_tokens=0)
    driver.finish()
    logprobs = tiny_reference(prompt)
    answer = driver.answers["echo"]
    assert answer.tokens[: len(prompt)] == prompt
    assert len(answer.tokens) == len(prompt) + 3
    assert [entry.token for entry in answer.logprobs] == answer.tokens
    assert answer.logprobs[0].logprob is None
    found = [entry.logprob for entry in answer.logprobs[1 : len(prompt)]]
    assert found == pytest.approx([float(logprobs[i, token]) for i, token in enumerate(prompt[1:])], abs=2e-4)
    assert answer.logprobs[5].top[0][0] == int(logprobs[4].argmax())
    assert driver.answers["bare"].tokens == answer.tokens[:-1]
    assert driver.answers["alone"].tokens == prompt
    assert len(driver.answers["alone"].logprobs) == len(prompt)
    assert driver.answers["one token"].tokens == prompt[:1]
    assert driver.answers["one token"].last.finish_reason == FinishReason.LENGTH


def test_a_high_priority_preempts_a_low_one(drive, prompts, expected):
    driver = drive(max_sequences=1)
    driver.warm("lora")
    driver.submit("low", prompts[None])
    for _ in range(3):
        driver.step()
    driver.submit("lora", prompts["lora"], "lora", priority=1, tenant="other")
    answers = driver.finish()
    assert (answers["low"], answers["lora"]) == (expected["None"], expected["lora"])
    ended = [output.request_id for step in driver.steps for output in step if output.finish_reason]
    assert ended[-2:] == ["lora", "low"]


def test_an_evicted_adapter_is_reloaded_from_the_host_cache(drive, adapters, prompts, expected):
    read = []

    def source(version):
        read.append(version)
        return adapters[version]

    driver = drive(source, adapter_slots=1, host_bytes=LARGEST + 4096)
    for number, version in enumerate(["all", "lora", "all", "lora", "rslora", "all"]):
        driver.submit(f"{number}", prompts[version], version)
        assert driver.finish()[f"{number}"] == expected[version]
        driver.engine._adapters._loader._releaser.submit(lambda: None).result()
        assert driver.engine.stats.host_bytes <= LARGEST + 4096
    # The host cache holds two of them, but not together with the third.
    assert read == ["all", "lora", "rslora", "all"]


def test_a_stop_token_ends_the_answer_and_is_not_in_it(drive, prompts, expected):
    driver = drive()
    tokens = expected["None"]
    stop = tokens[4]
    driver.submit("a", prompts[None], stop_ids=(stop,))
    driver.finish()
    assert driver.answers["a"].tokens == tokens[: tokens.index(stop)]
    assert driver.answers["a"].last.finish_reason == FinishReason.STOP
    assert driver.answers["a"].last.tokens == ()


def test_logprobs_come_with_the_tokens(drive, prompts, expected):
    driver = drive()
    driver.submit("a", prompts["all"], "all", logprobs=3)
    driver.submit("b", prompts["all"], "all", logprobs=0, temperature=2.0, seed=1)
    driver.finish()
    logprobs = driver.answers["a"].logprobs
    assert [entry.token for entry in logprobs] == expected["all"]
    assert all(entry.top[0] == (entry.token, pytest.approx(entry.logprob)) for entry in logprobs)
    assert all(len(entry.top) == 3 and entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1] for entry in logprobs)
    assert [entry.token for entry in driver.answers["b"].logprobs] == driver.answers["b"].tokens
    assert all(entry.top == () for entry in driver.answers["b"].logprobs)


def test_an_answer_is_capped_at_the_context_and_at_the_cache(drive):
    driver = drive()
    driver.submit("context", [1] * 250, max_tokens=100)
    driver.finish()
    assert len(driver.answers["context"].tokens) == 256 - 250
    assert driver.answers["context"].last.finish_reason == FinishReason.LENGTH
    small = drive(kv_tokens=48)
    small.submit("cache", [1] * 43, max_tokens=100)
    small.finish()
    assert len(small.answers["cache"].tokens) == 48 - 43 + 1


def test_a_cold_adapter_delays_only_its_own_request(drive, adapters, prompts, expected):
    gate = threading.Event()

    def source(version):
        if version == "all":
            assert gate.wait(20)
        return adapters[version]

    driver = drive(source)
    driver.submit("all", prompts["all"], "all")
    driver.submit("lora", prompts["lora"], "lora")
    driver.submit("None", prompts[None])
    while driver.answers["lora"].last is None or driver.answers["None"].last is None:
        assert driver.engine.wait(20)
        driver.step()
    assert driver.answers["lora"].tokens == expected["lora"]
    assert driver.engine.stats.loading == ("all",)
    driver.step()
    assert not driver.engine.has_work
    assert not driver.engine.wait(0.01)
    gate.set()
    assert driver.finish()["all"] == expected["all"]


def test_tenants_take_turns(drive):
    driver = drive(max_sequences=1)
    for i in range(3):
        driver.submit(f"loud {i}", [1], tenant="loud", max_tokens=1)
    for i in range(2):
        driver.submit(f"quiet {i}", [2], tenant="quiet", max_tokens=1)
    driver.finish()
    order = [output.request_id for step in driver.steps for output in step]
    assert order == ["loud 0", "quiet 0", "loud 1", "quiet 1", "loud 2"]


def test_a_version_in_constant_use_does_not_starve_another(drive, prompts):
    driver = drive(adapter_slots=1, slot_patience_steps=4)
    driver.warm("lora")
    driver.submit("hot 0", prompts["lora"], "lora", max_tokens=10)
    driver.submit("cold", prompts["all"], "all", max_tokens=2)
    hot = 0
    # Always two of the hot version, overlapping: its slot is never idle by itself.
    while driver.answers["cold"].last is None and hot < 20:
        hot += 1
        driver.submit(f"hot {hot}", prompts["lora"], "lora", max_tokens=10)
        for _ in range(5):
            assert driver.engine.wait(20)
            driver.step()
    assert driver.answers["cold"].last is not None
    driver.finish()


def test_waiting_ends_with_a_submit_from_another_thread(drive):
    driver = drive()
    assert not driver.engine.wait(0.01)
    thread = threading.Timer(0.05, lambda: driver.submit("a", [1]))
    thread.start()
    assert driver.engine.wait(20)
    thread.join()
    driver.finish()
