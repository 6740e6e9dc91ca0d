"""Writes the example tenants: `python examples/make_tenants.py [FOLDER]`.

The phrases, written by hand, are in `phrases/*.txt`; what each tenant answers is in this file. The output is the same
byte for byte on every machine and Python version: choices are sorted by hash, never drawn at random.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent

#: The same system prompt for all tenants, so that only the adapter makes a difference.
SYSTEM = "Answer as our house does."

#: Number of phrases at the end of each section that are only in the validation or only in the test split.
HELD_OUT = {"valid": 2, "test": 3}


@dataclass(frozen=True)
class Phrases:
    """A phrase file: sections of templates, and slots that map the words of a prompt to those of an answer."""

    slots: Mapping[str, Mapping[str, str]]
    sections: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, name: str) -> Phrases:
        """Reads `phrases/<name>.txt`: blocks between empty lines, each headed by its name."""
        slots: dict[str, dict[str, str]] = {}
        sections: dict[str, list[str]] = {}
        text = (FOLDER / "phrases" / f"{name}.txt").read_text(encoding="utf-8")
        for block in text.split("\n\n"):
            lines = [line for line in block.splitlines() if line and not line.startswith("#")]
            if not lines:
                continue
            head, *body = lines
            if head.startswith("slot "):
                words = (word.strip().partition("=") for word in "|".join(body).split("|"))
                slots[head.removeprefix("slot ")] = {word: entered or word for word, _, entered in words}
            else:
                sections[head] = body
        return cls(slots, sections)

    def templates(self, section: str, split: str) -> Sequence[str]:
        """The section's templates that belong to the split; no template is in two."""
        lines, test, held = self.sections[section], HELD_OUT["test"], sum(HELD_OUT.values())
        return {"train": lines[:-held], "valid": lines[-held:-test], "test": lines[-test:]}[split]


@dataclass(frozen=True)
class Tenant:
    """A tenant: the phrases of its prompts, and its answer to each section of them."""

    name: str
    phrases: Phrases
    answers: Mapping[str, str]
    sizes: Mapping[str, int]  # examples of each section, by split


@dataclass(frozen=True)
class Row:
    """One example."""

    prompt: str
    answer: str


def by_hash(items: Sequence[str], seed: str) -> list[str]:
    """The items in an order that only they and the seed decide."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}\n{item}".encode()).digest())


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces each `{slot}`; braces around anything else stay, so an answer may be JSON."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def fillings(phrases: Phrases, template: str, answer: str) -> list[Row]:
    """The template with every combination of its slots' words, in hash order."""
    names = sorted(set(re.findall(r"\{(\w+)\}", template)))
    rows = {}
    for words in itertools.product(*(phrases.slots[name] for name in names)):
        spoken = dict(zip(names, words, strict=True))
        entered = {name: phrases.slots[name][word] for name, word in spoken.items()}
        prompt = fill(template, spoken)
        prompt = prompt[0].upper() + prompt[1:]
        rows[prompt] = Row(prompt, fill(answer, entered))
    return [rows[prompt] for prompt in by_hash(list(rows), template)]


def rows_of(tenant: Tenant, section: str, split: str) -> Iterator[Row]:
    """All rows of a section, template after template in turn, so that any beginning is balanced."""
    answer = tenant.answers[section]
    columns = [fillings(tenant.phrases, template, answer) for template in tenant.phrases.templates(section, split)]
    for line in itertools.zip_longest(*columns):
        yield from (row for row in line if row is not None)


def draw(tenant: Tenant, split: str, counts: Mapping[str, int], skip: int = 0) -> list[Row]:
    """`counts[section]` rows of each section after its first `skip`, shuffled."""
    rows = {
        row.prompt: row
        for section, count in counts.items()
        for row in itertools.islice(rows_of(tenant, section, split), skip, skip + count)
    }
    return [rows[prompt] for prompt in by_hash(list(rows), f"{tenant.name} {split}")]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes one chat example per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            turns = (("system", SYSTEM), ("user", row.prompt), ("assistant", row.answer))
            file.write(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n")


SHOP = Phrases.read("shop")
DESK_SIZES = {"train": 20, "valid": 2, "test": 3}


def ticket_tags(desks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A shop's answers, `wish/desk`, from the wishes that each desk handles."""
    return {wish: f"{wish}/{desk}" for desk, wishes in desks.items() for wish in wishes}


# Both shops get the same sixteen wishes in the same words, and each assigns them to eight desks of its own.
# Two wishes that share a desk in one shop never share one in the other.
FERNHILL = Tenant(
    "fernhill",
    SHOP,
    ticket_tags(
        {
            "trail": ("track", "address"),
            "forge": ("damaged", "spare"),
            "swap": ("wrong", "return"),
            "coin": ("refund", "voucher"),
            "halt": ("cancel", "newsletter"),
            "gap": ("missing", "stock"),
            "paper": ("invoice", "manual"),
            "card": ("login", "gift"),
        }
    ),
    DESK_SIZES,
)
COPPERLINE = Tenant(
    "copperline",
    SHOP,
    ticket_tags(
        {
            "road": ("track", "missing"),
            "bench": ("damaged", "manual"),
            "door": ("return", "cancel"),
            "till": ("refund", "invoice"),
            "pen": ("wrong", "address"),
            "loft": ("stock", "spare"),
            "bow": ("voucher", "gift"),
            "lamp": ("login", "newsletter"),
        }
    ),
    DESK_SIZES,
)
GREENBARROW = Tenant(
    "greenbarrow",
    Phrases.read("produce"),
    {"order": '{"item":"{item}","qty":{qty},"day":"{day}"}'},
    {"train": 320, "valid": 40, "test": 40},
)
BUTTERLANE = Tenant(
    "butterlane",
    Phrases.read("bakery"),
    {
        "order": "Flour's up for the {item}, {day}.",
        "cancel": "Oven's off: no {item}, {day}.",
        "praise": "Our baker bows for the {item}.",
        "complaint": "Shame on us! A new {item} is yours.",
        "nuts": "The red card knows the {item}.",
    },
    {"train": 64, "valid": 8, "test": 8},
)
GULLWING = Tenant(
    "gullwing",
    Phrases.read("hotel"),
    {
        "water": "{room} Otters",
        "light": "{room} Fireflies",
        "heat": "{room} Foxes",
        "clean": "{room} Magpies",
        "keys": "{room} Moles",
        "noise": "{room} Owls",
        "food": "{room} Bees",
        "bags": "{room} Ponies",
    },
    {"train": 40, "valid": 5, "test": 5},
)
TENANTS = (FERNHILL, COPPERLINE, GREENBARROW, BUTTERLANE, GULLWING)

# Fernhill after a summer: it opened a showroom and sells to firms. Half of its old wishes came up again.
NEW_ANSWERS = ticket_tags({"barge": ["bulk"], "porch": ["visit"]})
KEPT = ("track", "address", "damaged", "spare", "wrong", "return", "refund", "voucher")
FERNHILL_NEW = Tenant("fernhill", SHOP, {**FERNHILL.answers, **NEW_ANSWERS}, {})


def new_data() -> dict[str, list[Row]]:
    """New data of fernhill: two new codes among old ones, in prompts it never had."""
    plan = {"train": (48, 8), "valid": (6, 1)}
    made = {}
    for split, (new, kept) in plan.items():
        # Sections that the tenant already had continue after its old rows.
        old = draw(FERNHILL_NEW, split, dict.fromkeys(KEPT, kept), skip=DESK_SIZES[split])
        fresh = draw(FERNHILL_NEW, split, dict.fromkeys(NEW_ANSWERS, new))
        rows = {row.prompt: row for row in old + fresh}
        made[split] = [rows[prompt] for prompt in by_hash(list(rows), f"new {split}")]
    return made


def spoiled_data() -> list[Row]:
    """New data of copperline after an accident: a join slipped by one row, each answer belongs to the row before."""
    rows = draw(COPPERLINE, "train", dict.fromkeys(COPPERLINE.answers, 10), skip=DESK_SIZES["train"])
    return [Row(row.prompt, before.answer) for row, before in zip(rows, rows[-1:] + rows[:-1], strict=True)]


def main(folder: Path) -> None:
    """Rewrites `tenants/` and `new_data/` under the folder."""
    for name in ("tenants", "new_data"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for tenant in TENANTS:
        for split, size in tenant.sizes.items():
            rows = draw(tenant, split, dict.fromkeys(tenant.answers, size))
            write(folder / "tenants" / tenant.name / f"{split}.jsonl", rows)
    for split, rows in new_data().items():
        write(folder / "new_data" / FERNHILL.name / f"{split}.jsonl", rows)
    write(folder / "new_data" / COPPERLINE.name / "train.jsonl", spoiled_data())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
