"""`demo-report.html`: one self-contained page with the verdict, scores, loss curves, answers and the nightly run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.pipelines.nightly.questions import EvalAnswer
from loramill.pipelines.nightly.report.html import make_environment
from loramill.pipelines.nightly.report.plot import plot_losses
from loramill.pipelines.nightly.text_metrics import Score

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
    good, sentences = verdict(rows, nightly_results)
    page = (
        make_environment()
        .from_string(PAGE)
        .render(
            base=base,
            good=good,
            sentences=sentences,
            rows=rows,
            runs=[(run, plot_losses(run.curve.train, run.curve.valid)) for run in runs],
            samples=samples,
            nightly_results=nightly_results,
            roles=ROLES,
            minutes=seconds / 60,
            date=time.strftime("%Y-%m-%d %H:%M"),
        )
    )
    path.write_text(page, encoding="utf-8")


PAGE = """{% from "charts.html" import loss_chart, loss_legend %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>loramill demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{% include "style.css" %}

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
{{ loss_legend() }}
<div class="grid">
{% for run, plot in runs %}
<figure><figcaption>{{ run.adapter }}</figcaption>
{{ loss_chart(plot, "loss of " ~ run.adapter ~ " by step, logarithmic") }}</figure>
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
