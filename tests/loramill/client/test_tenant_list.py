"""Tenant list files: what is read, and each problem with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramill.client.tenant_list import NewTenant, read_tenants
from loramill.errors import InvalidRequest

ACME = NewTenant(name="acme", weight=2.5, requests_per_minute=60, stored_bytes="unlimited")
BOTH = [ACME, NewTenant(name="globex")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"# customers\nacme\n\n  globex \n", [NewTenant(name="acme"), NewTenant(name="globex")]),
        ("a.csv", b"name,weight,requests_per_minute,stored_bytes\nacme,2.5,60,unlimited\nglobex,,,\n", BOTH),
        (
            "a.csv",
            b"\xef\xbb\xbfname;weight;requests_per_minute;stored_bytes\r\nacme;2.5;60;unlimited\r\nglobex;;;\r\n",
            BOTH,
        ),
        ("a.tsv", b"name\tweight\trequests_per_minute\tstored_bytes\nacme\t2.5\t60\tunlimited\n\nglobex\t\t\t\n", BOTH),
        (
            "a.jsonl",
            b'{"name": "acme", "weight": 2.5, "requests_per_minute": 60, "stored_bytes": "unlimited"}\n"globex"\n',
            BOTH,
        ),
        ("a.csv", b'name\n"acme"\n123\n', [NewTenant(name="acme"), NewTenant(name="123")]),
    ],
)
def test_a_list_is_read(tmp_path: Path, name: str, content: bytes, expected: list[NewTenant]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_tenants(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        (
            "a.txt",
            b"acme\nBad Name\nacme\n",
            ["line 2: 'Bad Name' is not a valid name for a tenant", "line 3: 'acme' is already on line 1"],
        ),
        (
            "a.csv",
            b"\nname,weight\nacme,0\nglobex,many\n",
            ["line 3: 'weight' is 0; give", "line 4: 'weight' is 'many'"],
        ),
        (
            "a.csv",
            b"name,max_running\nacme,-1\nglobex,1.5\n",
            ["line 2: 'max_running' is -1", "line 3: 'max_running' is 1.5"],
        ),
        ("a.csv", b"name,price\nacme,1\n", ["the column price; allowed are name, weight"]),
        ("a.csv", b"tenant\nacme\n", ["the column tenant; allowed are name"]),
        ("a.csv", b"weight\n1\n", ["no column 'name'"]),
        ("a.csv", b"name,weight\nacme,1,2\n", ["line 2: the row has more cells than columns"]),
        ("a.csv", b"name,weight\n,1\n", ["line 2: 'name' is missing"]),
        ("a.jsonl", b'{"name": "acme"\n', ["line 1: invalid JSON"]),
        (
            "a.jsonl",
            b'{"name": 5}\n{"name": "a", "size": 1}\n[]\n{"name": "b", "max_queued": true}\n',
            [
                "line 1: 'name' is 5; give text",
                "line 2: there is no setting 'size'",
                "line 3: the line is not an object",
                "line 4: 'max_queued' is True",
            ],
        ),
        ("a.txt", b"# nothing\n", ["contains no tenant"]),
        ("a.csv", b"", ["no column 'name'"]),
        ("a.txt", b"caf\xe9\n", ["is not UTF-8 (byte 3)"]),
    ],
)
def test_each_problem_is_reported_with_its_line(tmp_path: Path, name: str, content: bytes, messages: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest) as refused:
        read_tenants(tmp_path / name)
    for each in messages:
        assert each in refused.value.message
    assert len(refused.value.message.splitlines()) == len(messages)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="can't be read"):
        read_tenants(tmp_path / "none.csv")
