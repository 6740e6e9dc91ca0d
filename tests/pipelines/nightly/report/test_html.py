"""The page: self-contained, escaped, usable without a script, and with every part of the report."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from loramill.pipelines.nightly.report.html import render_html
from loramill.pipelines.nightly.report.summarize import APPROVAL_PAGE, summarize
from loramill.types import RolloutKind, StepStatus

from .runs import aside, awaiting, complete, failed, records, rollout, step

VOID = {"meta", "input", "line", "polyline", "circle", "br"}
#: End tags that HTML lets a page leave out.
OPTIONAL = {"th", "td", "li", "option"}
ATTACK = "<script>alert('x')</script>"


class Page(HTMLParser):
    """The elements of a page with their attributes; the test fails where they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag and self.open[-1] in OPTIONAL:
            self.open.pop()
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*steps, **changes) -> str:
    return render_html(summarize(records([each for group in steps for each in group], **changes)))


@pytest.mark.parametrize("gateway", [None, "https://llm.example.org"])
def test_a_challenger_that_waits_has_the_command_that_approves_it(gateway: str | None) -> None:
    text = page_of(awaiting("acme/a"), gateway=gateway)
    command = "loramill nightly approve nightly-1 acme/a"
    assert f"It waits for approval: <code>{command}</code>" in text and f"<code>{command} --reject</code>" in text
    assert "loramill nightly approve nightly-1 --all" in text and "--all" not in page_of(complete("acme/a"))
    assert "Promote it all the same" not in text
    links = {each["href"] for each in Page(text).all("a")} - {"#adapter-1"}
    assert links == (set() if gateway is None else {gateway + APPROVAL_PAGE})


def test_the_page_has_every_part_of_the_report() -> None:
    text = page_of(failed("acme/bad"), complete("acme/good"), set_aside=[aside("acme/old")])
    page = Page(text)
    assert page.open == [] and page.all("html") == [{"lang": "en"}]
    for part in (
        "2026-11-30 00:53 UTC",
        "nightly-1",
        "The loss is NaN.",
        "it gains 0.200",
        "+0.200",
        "+0.150",
        "file-9",
    ):
        assert part in text or part.capitalize() in text
    assert "loramill rollback acme/good" in text and "loramill nightly retry acme/old" in text
    assert "monday.jsonl, line 3" in text and text.index("acme/bad") < text.index("acme/good")
    assert len(page.all("details")) == 2 and "open" in page.all("details")[0]
    assert len([each for each in page.all("svg") if each.get("role") == "img"]) == 3


def test_the_page_needs_no_network() -> None:
    text = page_of(complete("acme/a"), failed("acme/b"))
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|src=", text)
    assert all(str(each["href"]).startswith("#adapter-") for each in Page(text).all("a"))
    assert not Page(text).all("link")


def test_only_the_script_of_the_page_may_run() -> None:
    text = page_of(complete("acme/a"))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [each["content"] for each in Page(text).all("meta") if "http-equiv" in each]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@pytest.mark.parametrize("place", ["reason", "error", "file", "verdict reason", "set aside", "interrupted", "slice"])
def test_what_tenants_wrote_is_escaped(place: str) -> None:
    good, bad, changes = complete("acme/a"), failed("acme/b"), {}
    match place:
        case "reason":
            good = complete("acme/a", reason=ATTACK)
        case "error":
            bad = failed("acme/b", ATTACK)
        case "file":
            quarantine = {"file": "file-9", "reasons": [f"{ATTACK}.jsonl, line 1: it is empty."]}
            good[0] = step("acme/a", "collect", {"counts": {"quarantined": 1}, "quarantine": quarantine})
        case "verdict reason":
            good = [step("acme/a", "collect", {"waiting": ATTACK}, StepStatus.PENDING)]
        case "set aside":
            changes = {"set_aside": [aside("acme/c", reason=ATTACK)]}
        case "interrupted":
            changes = {"interrupted": ATTACK}
        case "slice":
            slices = {f"new:{ATTACK}": {"challenger": {"examples": 2, "token_f1": 0.5}}}
            good[2] = step("acme/a", "evaluate", {"slices": slices})
    text = page_of(good, bad, **changes)
    assert "alert(" in text and text.count("<script") == 1 and "&lt;script&gt;" in text.lower()


def test_columns_and_rows_have_headers_and_roles_on_narrow_screens() -> None:
    page = Page(page_of(complete("acme/a")))
    assert page.all("table")
    for tag, role in {"table": "table", "tr": "row", "td": "cell"}.items():
        assert {each.get("role") for each in page.all(tag)} == {role}
    assert {each.get("role") for each in page.all("th")} == {"columnheader", "rowheader"}
    assert all(each.get("data-label") for each in page.all("td"))
    assert {each["for"] for each in page.all("label")} == {
        each["id"] for tag in ("input", "select") for each in page.all(tag)
    }


def test_no_element_is_wider_than_a_phone() -> None:
    text = page_of(complete("acme/a"))
    widths = [int(width) for width in re.findall(r"(?<!max-)(?<!-)\bwidth: (\d+)px", text)]
    assert widths and max(widths) <= 320
    assert all("width" not in each for tag in ("table", "td", "th", "svg") for each in Page(text).all(tag))


def test_a_run_without_adapters_has_a_page() -> None:
    text = page_of()
    assert "No adapter had new data." in text and "<script" not in text and "<table" not in text


def test_hundreds_of_adapters_stay_small_and_closed() -> None:
    text = page_of(*(complete(f"acme/a{number}") for number in range(300)))
    assert len(text) < 4_000_000
    assert sum("open" in each for each in Page(text).all("details")) == 1


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colors."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_color_has_the_contrast_of_wcag_aa_in_both_modes() -> None:
    themes = re.findall(r":root {(.*?)}", page_of(), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = {
            name: value if len(value) == 7 else "#" + "".join(digit * 2 for digit in value[1:])
            for name, value in re.findall(r"--(\w+): (#[0-9a-f]+)", theme)
        }
        for name in ("text", "muted", "good", "bad", "warn", "own", "valid", "third"):
            for ground in ("page", "card"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)


def test_rollouts_have_the_numbers_of_both_versions_and_their_reasons() -> None:
    watch = rollout("acme/a", f"empty answers rose {ATTACK}")
    canary = watch.model_copy(update={"kind": RolloutKind.CANARY, "share": 0.2, "state": "under way", "compared": None})
    text = page_of(complete("acme/a"), rollouts=[canary, watch])
    for part in ("Canaries and watches", "1,234 / 90", "57 / 0", "watch of", "canary, 20% of", "Empty answers rose"):
        assert part in text
    assert ATTACK not in text
