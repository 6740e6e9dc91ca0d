"""`demo-report.html`: one self-contained page with the verdict, scores, loss curves, answers and the nightly run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from loramill.pipelines.nightly.questions import EvalAnswer
from loramill.pipelines.nightly.scoring import Score

#: The plot's place in its SVG: left, top, right, bottom.
LEFT, TOP, RIGHT, BOTTOM = 66.0, 10.0, 408.0, 146.0
#: Losses below are drawn here: on a logarithmic axis there is no zero.
LEAST_LOSS = 1e-3
ROLES = ("base", "champion", "challenger")


@dataclass(frozen=True)
class Row:
    """One tenant's line of the table; `others` are the best adapters of other tenants, several if they tie."""

    tenant: str
    base: Score
    own: Score
    others: tuple[str, ...]
    other: Score

    @property
    def wins(self) -> bool:
        """Whether the own adapter beats base and every other: by exact match, by token F1 where that is equal."""
        return rank(self.own) > max(rank(self.base), rank(self.other))

    @property
    def ties(self) -> bool:
        """Whether the base or another adapter is equally good, and none is better."""
        return rank(self.own) == max(rank(self.base), rank(self.other))

    @property
    def other_name(self) -> str:
        """The best other adapter's tenant, or how many tie."""
        return self.others[0].partition("/")[0] if len(self.others) == 1 else f"tie of {len(self.others)}"


@dataclass(frozen=True)
class Curve:
    """A job's losses by step, in nats per token."""

    train: Mapping[int, float]
    valid: Mapping[int, float]


@dataclass(frozen=True)
class Run:
    """The result of a fine-tune job; `tokens` are those that it trained on, `seconds` from its start to its end."""

    adapter: str
    version: str
    steps: int
    tokens: int
    seconds: float
    curve: Curve


@dataclass(frozen=True)
class Sample:
    """One test question with the right answer, the adapter's and the base's."""

    tenant: str
    question: str
    reference: str
    own: EvalAnswer
    base: EvalAnswer

    @property
    def right(self) -> bool:
        """Whether the adapter's answer is exactly right."""
        return self.own.text.strip() == self.reference.strip()


@dataclass(frozen=True)
class NightlyResult:
    """The nightly run's outcome for one adapter.

    Attributes:
        before, champion: the versions that answered before, and answer now.
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


def best(scores: Mapping[str, Score]) -> tuple[str, ...]:
    """The models that score best, all of them if they tie, by name."""
    top = max(map(rank, scores.values()))
    return tuple(sorted(model for model, score in scores.items() if rank(score) == top))


def verdict(rows: Sequence[Row], nightly_results: Sequence[NightlyResult]) -> tuple[bool, list[str]]:
    """Whether the demo succeeded, and the sentences of the headline."""
    wins, ties = sum(row.wins for row in rows), sum(row.ties for row in rows)
    own = sum(row.own.exact_match * row.own.examples for row in rows) / sum(row.own.examples for row in rows)
    base = sum(row.base.exact_match * row.base.examples for row in rows) / sum(row.base.examples for row in rows)
    tied = f" ({ties} more {'ties' if ties == 1 else 'tie'})" if ties else ""
    sentences = [
        f"{wins} of {len(rows)} adapters answer their own tenant's questions better than the base and every other "
        f"adapter{tied}: {own:.0%} are exactly right, {base:.0%} by the base alone."
    ]
    for line in nightly_results:
        what = "promoted" if line.promoted else "held back"
        data = "spoiled data" if line.spoiled else "new data"
        sentences.append(f"The nightly run {what} what {line.adapter} learned from {data}.")
    good = wins == len(rows) and not any(line.spoiled and line.promoted for line in nightly_results)
    return good, sentences


def write_report(
    path: Path,
    *,
    base: str,
    rows: Sequence[Row],
    runs: Sequence[Run],
    samples: Sequence[Sample],
    nightly_results: Sequence[NightlyResult],
    seconds: float,
) -> None:
    """Writes the page; it needs no network and no other file."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    good, sentences = verdict(rows, nightly_results)
    page = environment.from_string(PAGE).render(
        base=base,
        good=good,
        sentences=sentences,
        rows=rows,
        runs=[(run, plot(run.curve)) for run in runs],
        samples=samples,
        nightly_results=nightly_results,
        roles=ROLES,
        minutes=seconds / 60,
        date=time.strftime("%Y-%m-%d %H:%M"),
    )
    path.write_text(page, encoding="utf-8")


def plot(curve: Curve) -> dict[str, Any]:
    """A loss curve in the coordinates of its SVG: polylines, whole steps on one axis, decades of loss on the other."""
    losses = [max(LEAST_LOSS, loss) for loss in (*curve.train.values(), *curve.valid.values())] or [1.0]
    last = max(curve.train, default=1)
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))
    high = max(high, low + 1)

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last

    def y(loss: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(max(LEAST_LOSS, loss)) - low) / (high - low)

    def line(points: Mapping[int, float]) -> str:
        return " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in sorted(points.items()))

    return {
        "train": line(curve.train),
        "valid": line(curve.valid),
        "valid_points": [(x(step), y(loss)) for step, loss in curve.valid.items()],
        "losses": [(y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)],
        "steps": [(x(step), step) for step in whole_steps(last)],
    }


def whole_steps(last: int) -> list[int]:
    """At most seven round numbers of steps from 0 to `last`."""
    units = (unit * 10**power for power in range(9) for unit in (1, 2, 5))
    unit = next(unit for unit in units if last / unit <= 6)
    return list(range(0, last + 1, unit))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>loramill demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 :root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --muted: #57606a; --line: #d0d7de; --card: #f6f8fa;
  --good: #116329; --bad: #b3261e; --warn: #8a4600; --own: #1d4ed8; --valid: #b45309; }
 @media (prefers-color-scheme: dark) { :root { --page: #0f1318; --text: #e6e9ec; --muted: #a9b2bb; --line: #39424c;
  --card: #181e25; --good: #5fd38a; --bad: #ff9d94; --warn: #f5b556; --own: #8ab4ff; --valid: #f5b556; } }
 * { box-sizing: border-box; }
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem;
  background: var(--page); color: var(--text); overflow-wrap: break-word; }
 h2 { margin: 2.5rem 0 .5rem; } .note { color: var(--muted); font-size: 14px; margin: .5rem 0; }
 .verdict { border: 1px solid var(--line); border-left: 6px solid var(--bad); background: var(--card);
  padding: .8rem 1rem; border-radius: 6px; font-size: 18px; }
 .verdict.pass { border-left-color: var(--good); } .verdict p { margin: .3rem 0; }
 table { border-collapse: collapse; width: 100%; }
 th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
 thead th { color: var(--muted); font-weight: 600; } tbody th { font-weight: 600; }
 .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
 .good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
 .badge { display: inline-block; color: var(--warn); border: 1px solid; border-radius: 4px; padding: 0 .4em;
  font-weight: 600; }
 .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1rem; }
 .card, figure { border: 1px solid var(--line); border-radius: 6px; background: var(--card); margin: 0;
  padding: .7rem 1rem; min-width: 0; }
 figcaption, .card h3 { font-size: 16px; font-weight: 600; margin: 0 0 .3rem; }
 svg { width: 100%; display: block; } svg text { font-size: 12px; fill: var(--muted); }
 .key { display: inline-block; width: 1.4em; height: 3px; vertical-align: middle; margin: 0 .3em 0 1em; }
 dl { margin: 0; } dt { color: var(--muted); font-size: 14px; } dd { margin: 0 0 .4rem; }
 code { font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
 @media (max-width: 640px) {
  body { margin: 1rem auto; } svg text { font-size: 15px; } .verdict { font-size: 16px; }
  table, tbody, tr, td, tbody th { display: block; } thead { display: none; }
  tr { border: 1px solid var(--line); border-radius: 6px; background: var(--card); padding: .5rem .8rem;
   margin: .6rem 0; }
  td, tbody th { border: 0; padding: .1rem 0; text-align: left; white-space: normal; }
  td { display: flex; gap: 1rem; justify-content: space-between; }
  td::before { content: attr(data-label); color: var(--muted); flex: none; } td.n { text-align: right; }
  td.wide { display: block; } td.wide::before { display: block; }
 }
</style></head><body>
<h1>loramill demo</h1>
<div class="verdict {{ 'pass' if good }}">
{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}

</div>
<p>{{ rows|length }} tenants share the base model <b>{{ base }}</b>, with an adapter each. {{ date }};
{{ "%.1f"|format(minutes) }} minutes for everything on this page, on this machine.</p>

<h2>Exact answers to each tenant's own test questions</h2>
<table><thead><tr><th>Tenant<th class="n">Questions<th class="n">Base<th class="n">Own adapter
<th class="n">Best other adapter</tr></thead><tbody>
{% for row in rows %}
<tr><th>{{ row.tenant }}</th><td class="n" data-label="Questions">{{ row.own.examples }}</td>
<td class="n" data-label="Base">{{ "%.2f"|format(row.base.exact_match) }}</td>
<td class="n {{ 'good' if row.wins else 'bad' }}" data-label="Own adapter">{{ "%.2f"|format(row.own.exact_match) }}
{{ "✓" if row.wins else "= tie" if row.ties else "✗" }}</td>
<td class="n" data-label="Best other adapter">{{ "%.2f"|format(row.other.exact_match) }} ({{ row.other_name }})</td>
</tr>
{% endfor %}
</tbody></table>
<p class="note">Exact match: the share of answers that equal the right answer exactly. ✓: better than the base and every
other adapter; where exact match is equal, token F1 decides.</p>

<h2>Training</h2>
<table><thead><tr><th>Adapter<th>Version<th class="n">Steps<th class="n">Tokens<th class="n">Time
<th class="n">Tokens per second</tr></thead><tbody>
{% for run, plot in runs %}
<tr><th>{{ run.adapter }}</th><td data-label="Version"><code>{{ run.version[:12] }}</code></td>
<td class="n" data-label="Steps">{{ run.steps }}</td>
<td class="n" data-label="Tokens">{{ "{:,}".format(run.tokens) }}</td>
<td class="n" data-label="Time">{{ "%.0f"|format(run.seconds) }} s</td>
<td class="n" data-label="Tokens per second">
{{ "{:,.0f}".format(run.tokens / run.seconds) if run.seconds > 0 else "-" }}</td></tr>
{% endfor %}
</tbody></table>
<p class="note">Time from a job's start to its version; jobs that train at once share the machine.</p>
<p><span class="key" style="background:var(--own);margin-left:0"></span>training loss
<span class="key" style="background:var(--valid)"></span>validation loss</p>
<div class="grid">
{% for run, plot in runs %}
<figure><figcaption>{{ run.adapter }}</figcaption>
<svg viewBox="0 0 420 184" role="img" aria-label="loss of {{ run.adapter }} by step, logarithmic">
{% for y, label in plot.losses %}
<line x1="66" x2="408" y1="{{ y }}" y2="{{ y }}" stroke="var(--line)"/>
<text x="61" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for x, label in plot.steps %}
<text x="{{ x }}" y="162" text-anchor="middle">{{ label }}</text>
{% endfor %}
<text x="237" y="181" text-anchor="middle">optimizer step</text>
<text x="13" y="78" text-anchor="middle" transform="rotate(-90 13 78)">loss, nats</text>
<polyline fill="none" stroke="var(--own)" stroke-width="1.5" points="{{ plot.train }}"/>
<polyline fill="none" stroke="var(--valid)" stroke-width="2" points="{{ plot.valid }}"/>
{% for x, y in plot.valid_points %}<circle cx="{{ x }}" cy="{{ y }}" r="3" fill="var(--valid)"/>{% endfor %}

</svg></figure>
{% endfor %}
</div>
<p class="note">Mean loss of the answers' tokens in nats per token, on a logarithmic scale.</p>

<h2>Nightly run</h2>
{% for line in nightly_results %}
<section class="card" style="margin:1rem 0"><h3>{{ line.adapter }}:
<span class="{{ 'good' if line.promoted != line.spoiled else 'bad' }}">
{{ "promoted" if line.promoted else "held" }}</span></h3>
{% if line.spoiled %}
<p><span class="badge">Spoiled data</span> The answers of its new examples were shuffled on purpose, so that the new
version must be held.</p>
{% endif %}
<p>{{ line.reason[0]|upper }}{{ line.reason[1:] }}. Version <code>{{ line.champion[:12] }}</code> answers
{% if line.promoted %}now, after <code>{{ line.before[:12] }}</code>{% else %}as before{% endif %}.
</p>
<table><thead><tr><th>Held-out slice{% for role in roles %}<th class="n">{{ role|capitalize }}{% endfor %}</tr></thead>
<tbody>
{% for part, slice in line.scores.items() %}
<tr><th>{{ part }}</th>
{% for role in roles %}
<td class="n" data-label="{{ role|capitalize }}">
{{ "%.3f"|format(slice[role].token_f1) if role in slice else "-" }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></section>
{% endfor %}
<p class="note">Token F1 on held-out examples, answered by the serving engine. Slice <i>new</i> is from the new data;
<i>before</i> is the data that the champion was evaluated on.</p>

<h2>Answers</h2>
<div class="grid">
{% for sample in samples %}
<article class="card"><h3>{{ sample.tenant }}</h3><dl>
<dt>Question</dt><dd>{{ sample.question }}</dd>
<dt>Right answer</dt><dd><code>{{ sample.reference }}</code></dd>
<dt>Own adapter</dt><dd class="{{ 'good' if sample.right else 'bad' }}"><code>{{ sample.own.text }}
{{- "…" if sample.own.truncated }}</code> {{ "✓" if sample.right else "✗" }}</dd>
<dt>Base alone</dt><dd><code>{{ sample.base.text }}{{ "…" if sample.base.truncated }}</code></dd>
</dl></article>
{% endfor %}
</div>
<p class="note">“…”: cut off at twice the length of the right answer.</p>
</body></html>
"""
