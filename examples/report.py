"""`demo-report.html`: one self-contained page with the table, the loss curves, sample answers and the night."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from loramill.pipelines.scoring import Score

WIDTH, HEIGHT, MARGIN = 420, 180, 34


@dataclass(frozen=True)
class Row:
    """One tenant's line of the table."""

    tenant: str
    base: Score
    own: Score
    other_model: str
    other: Score

    @property
    def wins(self) -> bool:
        """Whether the own adapter beats base and every other: by exact match, by token F1 where that is equal."""
        return rank(self.own) > max(rank(self.base), rank(self.other))


@dataclass(frozen=True)
class Curve:
    """A job's losses by step."""

    train: Mapping[int, float]
    valid: Mapping[int, float]


@dataclass(frozen=True)
class Sample:
    """One test question with the right answer, the adapter's and the base's."""

    tenant: str
    question: str
    reference: str
    own: str
    base: str


@dataclass(frozen=True)
class NightLine:
    """What the nightly run did to one adapter.

    Attributes:
        before, champion: the versions that answered before, and that answers now.
        scores: by slice and role.
    """

    adapter: str
    spoiled: bool
    promoted: bool
    reason: str
    before: str
    champion: str
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]


def rank(score: Score) -> tuple[float, float]:
    """What scores are compared by."""
    return score.exact_match, score.token_f1


def write_report(
    path: Path,
    *,
    rows: Sequence[Row],
    curves: Mapping[str, Curve],
    samples: Sequence[Sample],
    night: Sequence[NightLine],
    seconds: float,
) -> None:
    """Writes the page; it needs no network and no other file."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE).render(
        rows=rows,
        plots=[(name, plot(curve)) for name, curve in sorted(curves.items())],
        samples=samples,
        night=night,
        minutes=seconds / 60,
        date=time.strftime("%Y-%m-%d %H:%M"),
    )
    path.write_text(page, encoding="utf-8")


def plot(curve: Curve) -> dict[str, Any]:
    """A loss curve in the coordinates of its SVG: polylines, and a few labelled ticks on each axis."""
    losses = [*curve.train.values(), *curve.valid.values()]
    last, top = max(curve.train, default=1), max(losses, default=1.0) * 1.05 or 1.0

    def x(step: float) -> float:
        return MARGIN + (WIDTH - MARGIN - 8) * step / last

    def y(loss: float) -> float:
        return 8 + (HEIGHT - MARGIN) * (1 - loss / top)

    def line(points: Mapping[int, float]) -> str:
        return " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in sorted(points.items()))

    return {
        "train": line(curve.train),
        "valid": line(curve.valid),
        "valid_points": [(x(step), y(loss)) for step, loss in curve.valid.items()],
        "losses": [(y(top * part / 4), f"{top * part / 4:.1f}") for part in range(5)],
        "steps": [(x(last * part / 4), round(last * part / 4)) for part in range(5)],
    }


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>loramill demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 :root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #c62828; --own: #2563eb; --valid: #d97706; }
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; width: 100%; }
 th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
 td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
 .good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); }
 .plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1rem; }
 figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; }
 svg text { font-size: 10px; fill: currentColor; opacity: .7; }
 .answers { table-layout: fixed; } .answers th:first-child { width: 6.5em; }
 code { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; } small { opacity: .7; }
</style></head><body>
<h1>loramill demo</h1>
<p>{{ rows|length }} tenants, one base model, an adapter each. {{ date }}, {{ "%.1f"|format(minutes) }} minutes.</p>

<h2>Exact match on each tenant's test questions</h2>
<table><thead><tr><th>tenant<th class="n">questions<th class="n">base<th class="n">own adapter
<th class="n">best other adapter</tr></thead><tbody>
{% for row in rows %}
<tr><td>{{ row.tenant }}<td class="n">{{ row.own.examples }}<td class="n">{{ "%.2f"|format(row.base.exact_match) }}
<td class="n {{ 'good' if row.wins else 'bad' }}">{{ "%.2f"|format(row.own.exact_match) }}
<td class="n">{{ "%.2f"|format(row.other.exact_match) }} <small>{{ row.other_model }}</small></tr>
{% endfor %}
</tbody></table>

<h2>Loss</h2>
<p><small><span style="color:var(--own)">&#9644;</span> training
<span style="color:var(--valid)">&#9644;</span> validation; completion tokens only</small></p>
<div class="plots">
{% for name, plot in plots %}
<figure><figcaption>{{ name }}</figcaption>
<svg viewBox="0 0 420 180" role="img" aria-label="loss of {{ name }} by step">
{% for y, label in plot.losses %}
<line x1="34" x2="412" y1="{{ y }}" y2="{{ y }}" stroke="var(--line)"/><text x="4" y="{{ y + 3 }}">{{ label }}</text>
{% endfor %}
{% for x, label in plot.steps %}<text x="{{ x }}" y="172" text-anchor="middle">{{ label }}</text>{% endfor %}

<polyline fill="none" stroke="var(--own)" stroke-width="1.5" points="{{ plot.train }}"/>
<polyline fill="none" stroke="var(--valid)" stroke-width="1.5" points="{{ plot.valid }}"/>
{% for x, y in plot.valid_points %}<circle cx="{{ x }}" cy="{{ y }}" r="2.5" fill="var(--valid)"/>{% endfor %}

</svg></figure>
{% endfor %}
</div>

<h2>Answers</h2>
<table class="answers"><thead><tr><th>tenant<th>question<th>right answer<th>own adapter<th>base</tr></thead><tbody>
{% for sample in samples %}
<tr><td>{{ sample.tenant }}<td>{{ sample.question }}<td><code>{{ sample.reference }}</code>
<td class="{{ 'good' if sample.own.strip() == sample.reference.strip() else 'bad' }}"><code>{{ sample.own }}</code>
<td><code>{{ sample.base }}</code></tr>
{% endfor %}
</tbody></table>

<h2>The night</h2>
<table><thead><tr><th>adapter<th>held-out slice<th class="n">base<th class="n">champion<th class="n">challenger
<th>decision</tr></thead><tbody>
{% for line in night %}
{% for part, roles in line.scores.items() %}
<tr><td>{% if loop.first %}{{ line.adapter }}{% if line.spoiled %} <small>spoiled data</small>{% endif %}{% endif %}
<td>{{ part }}
{% for role in ("base", "champion", "challenger") %}
<td class="n">{{ "%.2f"|format(roles[role].token_f1) if role in roles else "" }}
{% endfor %}
<td>{% if loop.first %}{{ "promoted" if line.promoted else "held" }}: {{ line.reason }}{% endif %}</tr>
{% endfor %}
{% endfor %}
</tbody></table>
<p><small>Token F1 on held-out examples, asked through the serving engine.</small></p>
</body></html>
"""
