"""The Grafana dashboard: every query is PromQL, about metrics and labels that /metrics really has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loramill.errors import Unavailable
from loramill.models.catalog import Base
from loramill.serve.api.dependencies import ServedBase
from loramill.serve.api.generation.metrics import GenerationMetrics
from loramill.serve.api.generation.model_lookup import Target
from loramill.serve.engine import EngineStats
from loramill.serve.metrics import definitions as metrics
from loramill.serve.metrics.engine import EngineMetrics
from loramill.serve.protocol import TextChunk, TextRequest

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples/grafana/loramill.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

#: What Grafana puts in, and something that it could be.
BUILT_IN = {"$__rate_interval": "1m", "$__range": "1h"}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of each sample that is exported, by its name, once everything has happened."""
    base = Base("tiny", Path("tiny"), "0" * 64, "LlamaForCausalLM", 512)
    target = Target("acme/support", ServedBase(base, None), "acme", "v", 0.0, "")
    with GenerationMetrics(target, [TextRequest("1", "acme", prompt="a")], 1) as watch:
        watch.record_chunk(0, TextChunk("a", 1, 1))
        watch.record_chunk(0, TextChunk("b", 1, 2, "stop"))
    GenerationMetrics(target, [TextRequest("2", "acme", prompt="a")], 1).record_end(Unavailable("none"))
    EngineMetrics("r1").update(EngineStats())
    metrics.HTTP_REQUESTS.labels("/v1/models", 200).inc()
    text = generate_latest(metrics.REGISTRY).decode()
    return {
        sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples
    }


def queries() -> Iterator[Any]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']} {target['refId']}")


def filled_in(query: str) -> str:
    for name, value in BUILT_IN.items():
        query = query.replace(name, value)
    return query


def nodes(expression: Any) -> Iterator[Any]:
    """An expression and all that it is made of."""
    yield expression
    inner = [getattr(expression, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for part in [*inner, *getattr(expression, "args", [])]:
        if part is not None:
            yield from nodes(part)


@pytest.mark.parametrize(("query", "legend"), queries())
def test_a_query_asks_for_what_is_there(query: str, legend: str, exported: dict[str, set[str]]) -> None:
    assert set(re.findall(r"\$(\w+)", query)) <= VARIABLES.keys() | {name[1:] for name in BUILT_IN}
    found = list(nodes(promql.parse(filled_in(query))))
    selectors = [node for node in found if isinstance(node, promql.VectorSelector)]
    assert {selector.name for selector in selectors} == set(re.findall(r"loramill_\w+", query)) <= exported.keys()
    for selector in selectors:
        assert {matcher.name for matcher in selector.matchers.matchers} <= exported[selector.name]
    labels = set().union(*(exported[selector.name] for selector in selectors))
    grouped = [set(node.modifier.labels) for node in found if getattr(node, "modifier", None) is not None]
    assert all(group <= labels for group in grouped)
    # The lines of one query differ by what it groups by.
    assert set(re.findall(r"{{(\w+)}}", legend)) == set().union(*grouped) - {"le"}


def test_the_walk_finds_what_is_nested() -> None:
    nested = promql.parse("topk(1, sum by (x) (rate(a[1m]) / (b + -c) > 0) or sum(rate(d[5m:1m])))")
    assert {node.name for node in nodes(nested) if isinstance(node, promql.VectorSelector)} == set("abcd")


def test_everything_that_is_exported_is_shown(exported: dict[str, set[str]]) -> None:
    shown = set(re.findall(r"loramill_\w+", json.dumps(PANELS)))
    families = {re.sub("_(total|created|bucket|count|sum)$", "", name) for name in exported}
    assert families == {re.sub("_(total|bucket|count|sum)$", "", name) for name in shown}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_has_a_title_a_description_and_a_unit(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in {"s", "short", "reqps", "ops", "bytes", "percentunit"}
    assert panel["targets"] and len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_rows() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Engine", "Adapters", "Tenants"]


def test_panels_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = [
        (x, y)
        for position in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24


def test_variables(exported: dict[str, set[str]]) -> None:
    assert set(VARIABLES) == {"datasource", "tenant", "adapter", "replica"}
    assert VARIABLES["datasource"]["type"] == "datasource" and VARIABLES["datasource"]["query"] == "prometheus"
    for name in ("tenant", "adapter", "replica"):
        variable = VARIABLES[name]
        assert variable["multi"] and variable["includeAll"] and variable["allValue"] == ".*"
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found is not None and found[2] == name
        assert name in exported[promql.parse(found[1]).name]


def test_it_is_a_dashboard_of_todays_grafana() -> None:
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] == "loramill"
    assert "id" not in DASHBOARD, "an import with another's number would take that one's place"
