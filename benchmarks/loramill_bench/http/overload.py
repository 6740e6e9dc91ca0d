"""Far more requests than can be served."""

from __future__ import annotations

from loramill_bench.http.answers import check_complete, latency, rate
from loramill_bench.http.site import Site
from loramill_bench.measure import Result

#: Of the capacity, what comes; for so many seconds; and what the latency may grow to.
_LOAD, _SECONDS, _LATENCY = 3.0, 20.0, 2.0
_EACH = 4


def measure(site: Site, rounds: int) -> list[Result]:
    """Requests that come at random at three times the capacity, whatever becomes of those before; Zipf over 64.

    The capacity is what the server answers as many streams with as its engine runs at once, and the latency there is
    theirs. Whom it has no room for must be told so by a 429 with Retry-After: all else is an error. `rounds` has no
    say.
    """
    full = site.serve.max_sequences
    site.ask(site.loramill, site.desk.closed("zipf", full, 1, "overload, to warm up"))
    busy = site.ask(site.loramill, site.desk.closed("zipf", full, _EACH, "capacity"))
    check_complete("loramill", [busy])
    offered = _LOAD * len(busy.answers) / busy.seconds
    over = site.ask(site.loramill, site.desk.arrivals("zipf", offered, _SECONDS, "overload"))
    return [
        Result("overload: p95 of the accepted", latency(over) / latency(busy), "of that at capacity", _LATENCY),
        Result("overload: errors", len(over.faults), f"of {len(over.answers)} requests", 0),
        Result("overload: accepted", len(over.served) / len(over.answers), "of the requests", better="higher"),
        Result("overload: answers", rate(over), "tokens/s", better="higher"),
        Result("overload: answers at capacity", rate(busy), "tokens/s", better="higher"),
        Result("overload: p95 at capacity", latency(busy), "s"),
    ]
