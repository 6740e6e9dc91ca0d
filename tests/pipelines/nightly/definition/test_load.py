"""nightly.yaml: defaults, and messages that name every fault with its line."""

from __future__ import annotations

import json
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from loramill.errors import DefinitionInvalid, SettingsInvalid
from loramill.pipelines.nightly.definition import (
    NO_FILE,
    NightlyDefinition,
    expanded,
    load_definition,
    parse_definition,
    read_definition,
)
from loramill.settings import NightlySettings, Settings

FILE = Path("/etc/loramill/nightly.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(DefinitionInvalid) as refused:
        parse_definition(text, FILE)
    assert refused.value.message.split("\n")[1:] == list(refused.value.problems)
    return list(refused.value.problems)


def problem(text: str) -> str:
    (found,) = problems(text)
    return found


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "schedule:\nsplit:\nsources:\n"])
def test_an_empty_file_has_the_defaults(text: str) -> None:
    found = parse_definition(text, FILE)
    assert found == NightlyDefinition()
    assert (found.schedule.enabled, found.schedule.cron, found.schedule.timezone) == (True, "0 2 * * *", "UTC")
    assert found.includes("acme/support") and found.split.held_out == 0.1 and found.replay.plain_examples == 64


def test_without_a_file_no_run_starts_by_itself(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path)
    assert load_definition(settings) == NO_FILE and not NO_FILE.schedule.enabled
    assert NO_FILE.model_copy(update={"schedule": NightlyDefinition().schedule}) == NightlyDefinition()
    (tmp_path / "nightly.yaml").write_text("")
    assert load_definition(settings) == NightlyDefinition()


def test_a_file_that_the_setting_names_must_exist(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path, nightly=NightlySettings(file=tmp_path / "other.yaml"))
    with pytest.raises(DefinitionInvalid, match=r"other\.yaml does not exist; create it"):
        load_definition(settings)
    (tmp_path / "other.yaml").write_text("adapters: acme/*\n")
    assert load_definition(settings).adapters == ("acme/*",)


def test_keys_of_a_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "nightly.yaml"
    file.write_text(
        "gate: {confidence: 0.9, approval: manual}\nreplay: {plain_examples: 8}\nnotify: {on: always}\nwatch:\n"
        "overrides: [{adapters: acme/*, split: {by: session}}]\n"
    )
    found = read_definition(file)
    assert (found.gate.confidence, found.gate.approval, found.split.by) == (0.9, "manual", None)
    assert found.for_adapter("acme/a").split.by == "session"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "nightly.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(DefinitionInvalid, match="can't be read"):
        read_definition(file)


def test_every_fault_is_reported_at_once_in_the_order_of_lines() -> None:
    text = "schedule:\n  cron: 0 2 * *\n  missed: never\nsplitt:\n  held_out: 2\nsplit:\n  held_out: 7\n"
    assert problems(text) == [
        "nightly.yaml:2: schedule.cron must have five fields: minute, hour, day of month, month, day of week, such as "
        "\"0 2 * * *\"; it is '0 2 * *'.",
        "nightly.yaml:3: schedule.missed must be 'once' or 'skip'; it is 'never'.",
        "nightly.yaml:4: splitt is not a key; did you mean split?",
        "nightly.yaml:7: split.held_out must be less than or equal to 0.5; it is 7.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split:\n  held_outs: 0.2\n", "nightly.yaml:2: split.held_outs is not a key; did you mean held_out?"),
        ("schedules:\n", "nightly.yaml:1: schedules is not a key; did you mean schedule?"),
        ("notify:\n  zzz: 1\n", "nightly.yaml:2: notify.zzz is not a key; the keys are webhook, on."),
        ("train:\n  options:\n    rnk: 3\n", "nightly.yaml:3: train.options.rnk is not a key; did you mean rank?"),
        (
            "overrides:\n  - adapters: acme/*\n    gate: {metrc: loss}\n",
            "nightly.yaml:3: overrides.1.gate.metrc is not a key; did you mean metric?",
        ),
        ("watch: 5\n", "nightly.yaml:1: watch must contain keys with values; it is 5."),
        ("- a\n", "nightly.yaml:1: the file must contain keys with values, such as `split:`."),
        ("train: {priority: low}\n", "nightly.yaml:1: train.priority must be a whole number; it is 'low'."),
        ("train: {options: {targets: 5}}\n", "nightly.yaml:1: train.options.targets must be a list or text; it is 5."),
        ("schedule: {enabled: maybe}\n", "nightly.yaml:1: schedule.enabled must be true or false; it is 'maybe'."),
        (
            "\nbudget:\n  wall_time: 5 hours\n",
            "nightly.yaml:3: budget.wall_time must be a duration such as 90s, 15m, 12h or 30d; it is '5 hours'.",
        ),
        (
            "budget: {wall_time: 5}\n",
            "nightly.yaml:1: budget.wall_time must be a duration such as 90s, 15m, 12h or 30d; it is 5.",
        ),
        (
            "schedule: {timezone: Berlin}\n",
            'nightly.yaml:1: schedule.timezone must be the name of a time zone, such as "Europe/Berlin" or "UTC"; '
            "it is 'Berlin'.",
        ),
        ("sources:\n  - adapters: acme/*\n", "nightly.yaml:2: sources.1 needs the key url."),
        ("evaluate: {metrics: []}\n", "nightly.yaml:1: evaluate.metrics must contain at least one metric."),
        (
            "canary: {share: 0.1}\noverrides:\n- adapters: acme/*\n  watch: {window: 0s}\n",
            "nightly.yaml:4: overrides.1: watch.window is 0s, but a canary lasts that long; set a longer one, or no "
            "canary.",
        ),
        (
            "watch: {window: 0s}\noverrides:\n- adapters: acme/*\n  canary: {shadow: true}\n",
            "nightly.yaml:4: overrides.1: watch.window is 0s, but a canary lasts that long; set a longer one, or no "
            "canary.",
        ),
        ("gate: {metric: judge}\n", "nightly.yaml:1: gate.metric is judge, but evaluate.judge is not set."),
        (
            "gate: {metric: loss}\n",
            "nightly.yaml:1: gate.metric is loss, but evaluate.metrics does not list it.",
        ),
        (
            "\nevaluate:\n  metrics: [exact_match]\n",
            "nightly.yaml:3: gate.metric is token_f1, but evaluate.metrics does not list it.",
        ),
        (
            "adapters: [a/*]\noverrides:\n  - adapters: a/b\n    evaluate:\n      metrics: [token_f1, judge]\n",
            "nightly.yaml:5: overrides.1: evaluate.metrics contains judge, but evaluate.judge is not set.",
        ),
        (
            "evaluate:\n  scorer: a:b\n  metrics: [token_f1]\n",
            "nightly.yaml:3: evaluate.scorer is set, but evaluate.metrics does not list scorer; add it, or set scorer "
            "to null.",
        ),
        (
            "evaluate: {metrics: [token_f1, loss, token_f1]}\n",
            "nightly.yaml:1: evaluate.metrics may not contain token_f1 twice.",
        ),
        (
            "evaluate: {slices_by: ''}\n",
            "nightly.yaml:1: evaluate.slices_by may not be empty; it is ''.",
        ),
        (
            "evaluate: {golden: 'golden/{user}.jsonl'}\n",
            "nightly.yaml:1: evaluate.golden may not contain {user}: only {tenant} and {adapter} are replaced; it is "
            "'golden/{user}.jsonl'.",
        ),
        (
            "adapters: a[/]b\n",
            "nightly.yaml:1: adapters may not contain / in brackets: it separates tenant and adapter, as in acme/*; "
            "it is 'a[/]b'.",
        ),
        (
            "train:\n  options: {start_from: champion}\n",
            "nightly.yaml:2: train.options may not contain start_from: train.start sets where training starts.",
        ),
        (
            "train:\n  options: {sweep: {rank: [8]}}\n",
            "nightly.yaml:2: train.options: 'rank' has 1 value: give at least two, or set the option instead.",
        ),
        (
            "train:\n  options:\n    epochs: 2\n    rank: -1\n",
            "nightly.yaml:4: train.options.rank must be greater than or equal to 1; it is -1.",
        ),
        (
            "train: {options: {sweep: {rank: [8, 512]}}}\n",
            "nightly.yaml:1: train.options.sweep.rank.2 must be less than or equal to 256; it is 512.",
        ),
        (
            "train: {options: {sweep: {rank: [8, x]}}}\n",
            "nightly.yaml:1: train.options.sweep.rank.2 must be a whole number; it is 'x'.",
        ),
        (
            "train: {options: {layers: 7-3}}\n",
            "nightly.yaml:1: train.options: 'loramill.layers': '7-3' is not an index or a range of layers; write for "
            "instance 0-7,20.",
        ),
    ],
)
def test_a_fault_names_its_line_and_what_is_allowed(text: str, message: str) -> None:
    assert problem(text) == message


def test_all_options_out_of_range_are_reported() -> None:
    wrong = {"rank": 0, "learning_rate": -1, "epochs": 0, "batch_size": 0, "alpha": 0, "dropout": 1, "steps": 0}
    found = problems("train:\n  options:\n" + "".join(f"    {name}: {value}\n" for name, value in wrong.items()))
    assert [text.split()[:3] for text in found] == [
        [f"nightly.yaml:{line}:", f"train.options.{name}", "must"] for line, name in enumerate(wrong, 3)
    ]
    right = {"rank": 8, "learning_rate": 1e-4, "epochs": 2, "layers": "0-3", "targets": "all-linear", "method": "qlora"}
    parse_definition(f"train: {{options: {json.dumps(right | {'train_on': 'last'})}}}\n", FILE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {adapters: acme/*, canary: {share: 0.2}}\n- {adapters: '*/legal', watch: {window: 0s}}\n",
            "nightly.yaml:3: overrides.2: watch.window is 0s, but a canary lasts that long; set a longer one, or no "
            "canary. Overrides 1 and 2 match adapters such as acme/legal.",
        ),
        (
            "- {adapters: acme/*, gate: {metric: loss}, evaluate: {metrics: [loss]}}\n"
            "- {adapters: [bolt/*, '*/legal'], evaluate: {metrics: [token_f1]}}\n",
            "nightly.yaml:3: overrides.2: gate.metric is loss, but evaluate.metrics does not list it. Overrides 1 and "
            "2 match adapters such as acme/legal.",
        ),
    ],
)
def test_overrides_that_match_one_adapter_may_not_contradict_each_other(text: str, message: str) -> None:
    assert problem(f"overrides:\n{text}") == message


@pytest.mark.parametrize(
    "text",
    [
        # No adapter has both.
        "- {adapters: acme/*, canary: {share: 0.2}}\n- {adapters: bolt/*, watch: {window: 0s}}\n",
        # The third one removes the contradiction, whenever the first two match.
        "- {adapters: acme/*, canary: {share: 0.2}}\n- {adapters: '*', canary: {share: 0.0}}\n"
        "- {adapters: '*/legal', watch: {window: 0s}}\n",
        # What a later one needs is set by an earlier one, for all adapters that it matches.
        "- {adapters: '*', evaluate: {judge: {url: 'https://judge/v1', model: big}}}\n"
        "- {adapters: acme/*, gate: {metric: judge}}\n",
    ],
)
def test_overrides_are_checked_only_as_they_match_together(text: str) -> None:
    assert len(parse_definition(f"overrides:\n{text}", FILE).overrides) >= 2


def test_contradictions_are_reported_at_once() -> None:
    assert [
        each.partition(": ")[2]
        for each in problems(
            "gate: {metric: judge}\ncanary: {share: 0.1}\nwatch: {window: 0s}\n"
            "overrides: [{adapters: a/b, evaluate: {metrics: [loss]}}]\n"
        )
    ] == [
        "gate.metric is judge, but evaluate.judge is not set.",
        "watch.window is 0s, but a canary lasts that long; set a longer one, or no canary.",
    ]


def test_globs_that_match_in_too_many_ways_are_refused() -> None:
    text = "".join(f"- {{adapters: '*{a}*{b}*/x', gate: {{max_loss: 0.1}}}}\n" for a in "abcdef" for b in "abcdef")
    assert problem(f"overrides:\n{text}") == (
        "nightly.yaml:1: overrides: their globs can match together in too many ways; use fewer with several *."
    )


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("schedule:\n  cron: * 2 * * *\n", "nightly.yaml:2: .*quote a text that begins with \\*"),
        ("split:\n\theld_out: 1\n", "nightly.yaml:2: .*indent with spaces"),
        ("split: {}\nsplit: {}\n", "nightly.yaml:2: the key split is there twice"),
        ("a: [", "nightly.yaml:1: "),
        ("a: &x [*x]", "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("? [a]\n: b\n", "nightly.yaml:1: a key must be a word"),
        ("a: \x07\n", "nightly.yaml:1: "),
        ("a: *missing\n", "nightly.yaml:1: "),
    ],
)
def test_text_that_is_not_yaml_names_the_line(text: str, fragment: str) -> None:
    with pytest.raises(DefinitionInvalid, match=fragment):
        parse_definition(text, FILE)


def test_words_that_yaml_1_1_changes_are_text() -> None:
    found = parse_definition("notify:\n  on: always\nsplit:\n  by: yes\n", FILE)
    assert found.notify.on == "always" and found.split.by == "yes"
    assert parse_definition("split: {by: '12'}", FILE).split.by == "12"


def test_durations_and_single_globs_are_read() -> None:
    found = parse_definition("adapters: acme/*\nexclude: '*/old-*'\nbudget: {wall_time: 6h}\n", FILE)
    assert found.budget.wall_time == timedelta(hours=6)
    assert found.includes("acme/support") and not found.includes("acme/old-one") and not found.includes("bolt/a")


def test_a_glob_without_a_tenant_is_refused() -> None:
    assert "must be * or tenant/adapter" in problem("adapters: support\n")


def test_one_source_never_feeds_several_tenants() -> None:
    assert "matches several tenants" in problem("sources:\n  - url: s3://bucket/*.jsonl\n")
    assert "matches several tenants" in problem("sources:\n  - {url: s3://b/*.jsonl, adapters: 'ac*/support'}\n")
    assert "only {tenant} and {adapter}" in problem("sources:\n  - url: s3://b/{tenants}/*.jsonl\n")
    found = parse_definition(
        "sources:\n  - {url: 's3://b/*.jsonl', adapters: acme/support}\n  - url: data/{tenant}/*.jsonl\n", FILE
    )
    assert [each.url for each in found.sources] == ["s3://b/*.jsonl", "/etc/loramill/data/{tenant}/*.jsonl"]


def test_paths_are_relative_to_the_file() -> None:
    found = parse_definition("evaluate: {golden: golden.jsonl, scorer: 'scorers/mine.py:score'}\n", FILE)
    assert found.evaluate.golden == "/etc/loramill/golden.jsonl"
    assert found.evaluate.scorer == "/etc/loramill/scorers/mine.py:score"
    found = parse_definition("evaluate: {golden: file-abc, scorer: 'package.module:score'}\n", FILE)
    assert (found.evaluate.golden, found.evaluate.scorer) == ("file-abc", "package.module:score")
    assert "package.module:function" in problem("evaluate: {scorer: mine}\n")


def test_a_scorer_and_a_judge_are_metrics_by_default() -> None:
    text = "evaluate: {scorer: 'a:b', judge: {url: 'https://judge/v1', model: big}}\ngate: {metric: judge}\n"
    assert parse_definition(text, FILE).evaluate.computed_metrics[-2:] == ("scorer", "judge")


def test_overrides_change_only_what_they_set_and_later_ones_win() -> None:
    found = parse_definition(
        """
train: {options: {rank: 4, epochs: 2}, start: fresh}
gate: {max_loss: 0.1}
overrides:
  - adapters: acme/*
    train: {options: {epochs: 3}}
    gate: {confidence: 0.99}
  - adapters: [acme/support, bolt/*]
    train: {start: both}
    gate: {confidence: 0.9}
""",
        FILE,
    )
    sales, support, other = (found.for_adapter(name) for name in ("acme/sales", "acme/support", "x/y"))
    assert sales.train.options.model_dump(exclude_unset=True) == {"rank": 4, "epochs": 3}
    assert (sales.train.start, sales.gate.confidence, sales.gate.max_loss) == ("fresh", 0.99, 0.1)
    assert (support.train.start, support.gate.confidence) == ("both", 0.9)
    assert support.train.options == sales.train.options
    assert (other.train, other.gate) == (found.train, found.gate)
    for again in (
        NightlyDefinition.model_validate(found.model_dump()),
        NightlyDefinition.model_validate_json(found.model_dump_json()),
    ):
        assert again == found and again.for_adapter("acme/sales") == sales


def test_aliases_to_aliases_are_refused_before_they_fill_the_memory() -> None:
    levels = "".join(f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in pairwise("abcdefghi"))
    assert "nightly.yaml:1: the file stands for more than 100000 values" in problem(
        f"a: &a [{', '.join('x' * 10)}]\n{levels}"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("budget: {tokens: %s}\n" % ("9" * 5000), "budget.tokens has too many digits"),
        ("budget: {gpu_seconds: 1e400}\n", "budget.gpu_seconds must be a finite number"),
        ("watch: {max_latency_ratio: inf}\n", "watch.max_latency_ratio must be a finite number"),
        (
            "budget: {wall_time: 999999999d}\n",
            "budget.wall_time must be a duration of at most 3650d; it is '999999999d'.",
        ),
        ("watch: {window: 9999999d}\n", "watch.window must be a duration of at most 3650d; it is '9999999d'."),
        ("evaluate: {scorer_time_limit: 0s}\n", "evaluate.scorer_time_limit must be longer than 0s; it is '0s'."),
        ("evaluate: {golden: ''}\n", "evaluate.golden may not be empty; it is ''."),
        ("sources: [{url: ' ', adapters: a/b}]\n", "sources.1.url may not be empty; it is ' '."),
        ("notify: {webhook: 'http://a b'}\n", "must be a URL that begins with http://"),
        ("notify: {webhook: '${}'}\n", "must be a URL that begins with http://"),
        (
            "evaluate: {judge: {url: http://x/v1, model: m, options: {stream: true}}}\n",
            "evaluate.judge.options may not contain stream, which",
        ),
    ],
)
def test_values_that_no_run_could_use_are_refused(text: str, reason: str) -> None:
    assert reason in problem(text)


def test_secrets_are_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse_definition("notify: {webhook: '${HOOK}/x'}\n", FILE)
    assert found.notify.webhook == "${HOOK}/x"
    monkeypatch.setenv("HOOK", "https://hooks.example")
    assert expanded(found.notify.webhook) == "https://hooks.example/x"
    monkeypatch.delenv("HOOK")
    with pytest.raises(SettingsInvalid, match="HOOK, which is not set"):
        expanded(found.notify.webhook)
    assert "http://" in problem("notify: {webhook: 'ftp://x'}\n")
