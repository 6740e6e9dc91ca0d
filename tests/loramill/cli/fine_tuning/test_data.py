"""`loramill submit`, `data` and `files`: every format works, and a failure leaves no files."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loramill import Client
from loramill.errors import Conflict, InvalidRequest
from loramill.registry import nightly

from ...conftest import RunningGateway, examples
from ..running import json_output, loramill, ok, use_gateway

PAGE = (Path(__file__).parents[4] / "docs" / "howto" / "submit-many.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def running_gateway(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunningGateway:
    """The gateway that commands call, with the admin's key, in an empty working directory."""
    use_gateway(monkeypatch, gateway)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return gateway


def table(path: str, header: str, separator: str = ",", count: int = 12) -> str:
    """A table of distinct questions and answers."""
    rows = (separator.join((f"what is {path} {i}?", f"number {i}")) for i in range(count))
    Path(path).write_text("\n".join([header, *rows]) + "\n")
    return path


def trained_on(job: str) -> list[Any]:
    """The lines of a job's training file."""
    with Client() as client:
        content = b"".join(client.files.content(client.jobs.get(job).training_file))
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize(
    ("path", "header", "separator", "message"),
    [
        ("a.tsv", "prompt\tcompletion", "\t", "TSV (separated by tabs), prompt and completion (prompt, completion)"),
        ("b.csv", "instruction;output", ";", "CSV separated by ';', Alpaca (instruction, output)"),
        ("c.csv", "prompt|completion", "|", "CSV separated by '|', prompt and completion (prompt, completion)"),
    ],
)
def test_the_recognized_format_is_shown(tenant: str, path: str, header: str, separator: str, message: str) -> None:
    output = ok("submit", f"{tenant}/a", "--train", table(path, header, separator)).stderr
    assert f"{path}: 12 examples; {message}." in output


def test_columns_that_are_not_used_are_shown(tenant: str) -> None:
    rows = [{"id": i, "prompt": f"p{i}", "completion": "c"} for i in range(12)]
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = ok("submit", f"{tenant}/a", "--train", "x.jsonl")
    assert "Warning: x.jsonl: unused columns: id." in ran.stderr
    assert trained_on(ran.stdout.strip())[3] == {"prompt": "p3", "completion": "c"}


def test_the_jobs_file_of_the_documentation_runs() -> None:
    """The commands run as printed, with files of the formats that they name."""
    made = set(re.findall(r"^\$ loramill tenant create ([\w ]+?)(?: +#.*)?$", PAGE, re.MULTILINE))
    with Client() as client:
        for tenant in " ".join(made).split():
            with suppress(Conflict):
                client.tenants.create(tenant)
    (text,) = (text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "[[jobs]]" in text)
    Path("jobs.toml").write_text(text)
    table("acme.csv", "question,answer")
    Path("bolt.jsonl").write_bytes(examples(12, "bolt"))
    Path("valid.jsonl").write_bytes(examples(5, "valid"))
    found = json.loads(ok("submit", "--file", "jobs.toml", "--json").stdout)
    assert [each["job"]["adapter"] for each in found] == ["acme/support", "bolt/sales"]
    assert trained_on(found[0]["job"]["id"])[3] == {"prompt": "what is acme.csv 3?", "completion": "number 3"}


def test_a_validation_file_may_have_the_columns_or_its_own(tenant: str) -> None:
    table("train.csv", "q,a")
    table("same.csv", "q,a", count=3)
    table("other.csv", "frage,antwort", count=3)
    Path("chat.jsonl").write_bytes(examples(3, "chat"))
    for valid, *more in (
        ["same.csv"],
        ["chat.jsonl"],
        ["other.csv", "--valid-columns", "prompt=frage,completion=antwort"],
    ):
        ok(
            "submit",
            f"{tenant}/a",
            "--train",
            "train.csv",
            "--columns",
            "prompt=q,completion=a",
            "--valid",
            valid,
            *more,
        )
    refused = loramill(
        "submit", f"{tenant}/a", "--train", "train.csv", "--columns", "prompt=q,completion=a", "--valid", "other.csv"
    )
    assert refused.exit_code == 1 and "other.csv has the columns frage, antwort" in refused.stderr


def test_missing_tenants_are_reported_once_before_any_upload(tenant: str) -> None:
    table("train.csv", "prompt,completion")
    Path("jobs.csv").write_text(
        f"adapter,train,valid\n{tenant}/a,train.csv,\nnobody/a,train.csv,train.csv\nnobody/b,train.csv,\nnoone/c,train.csv,\n"
    )
    refused = loramill("submit", "--file", "jobs.csv")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-3:] == [
        "2 problems; nothing was submitted:",
        "jobs.csv, line 3: There is no tenant 'nobody'. (`loramill tenant create nobody` creates it.)",
        "jobs.csv, line 5: There is no tenant 'noone'. (`loramill tenant create noone` creates it.)",
    ]
    assert json_output("files", "list", "--tenant", tenant) == []


def test_a_refused_submission_leaves_no_files(tenant: str) -> None:
    table("train.csv", "prompt,completion")
    table("kept.csv", "prompt,completion")
    ok("submit", f"{tenant}/a", "--train", "kept.csv")
    before = json_output("files", "list", "--tenant", tenant)
    Path("bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    Path("jobs.csv").write_text(
        f"adapter,train,rank\n{tenant}/a,train.csv,4\n{tenant}/b,bad.jsonl,4\n{tenant}/c,kept.csv,4\n"
    )
    assert loramill("submit", "--file", "jobs.csv").exit_code == 1  # the gateway refuses a file
    assert loramill("submit", f"{tenant}/a", "--train", "train.csv", "--rank", "100000").exit_code == 1  # or the job
    assert loramill("data", "add", f"{tenant}/a", "--train", "train.csv", "--valid", "bad.jsonl").exit_code == 1
    assert json_output("files", "list", "--tenant", tenant) == before
    with Client() as client, pytest.raises(InvalidRequest):
        client.jobs.submit_many([{"adapter": f"{tenant}/a", "train": "train.csv", "rank": 100_000}])
    assert json_output("files", "list", "--tenant", tenant) == before


def test_data_for_nightly_runs_comes_in_every_format(running_gateway: RunningGateway, tenant: str) -> None:
    name = f"{tenant}/a"
    assert "There is no adapter" in loramill("data", "list", name).stderr
    output = ok(
        "data", "add", name, "--train", table("new.csv", "q;a", ";"), "--columns", "prompt=q,completion=a"
    ).stderr
    assert "new.csv: 12 examples; CSV separated by ';', prompt and completion (prompt=q, completion=a)." in output
    rows = [{"conversations": [{"from": "human", "value": f"h{i}"}, {"from": "gpt", "value": "g"}]} for i in range(12)]
    Path("share.json").write_text(json.dumps(rows))
    with running_gateway.registry.writing() as session:
        run = nightly.open_run(session)
        nightly.collect(session, run.id, name)
        nightly.finish_run(session, run.id)
    ok("data", "add", name, "--train", "share.json", "--valid", table("valid.tsv", "instruction\toutput", "\t", 3))
    waiting, used = json_output("data", "list", name)
    assert (waiting["train_filename"], waiting["valid_filename"], waiting["run"]) == ("share.json", "valid.tsv", None)
    assert (used["train_filename"], used["train_examples"], used["run"]) == ("new.csv", 12, run.id)
    lines = ok("data", "list", name).stdout.splitlines()
    assert "waiting" in lines[1] and "share.json" in lines[1] and "used" in lines[2]


def test_files_are_listed_shown_and_deleted(tenant: str) -> None:
    assert "No files yet" in ok("files", "--tenant", tenant).stderr
    with Client() as client:
        file = client.files.upload(examples(12), tenant=tenant, filename="a.jsonl")
    line = ok("files", "list", "--tenant", tenant).stdout.splitlines()[1]
    assert file.id in line and "a.jsonl" in line and " 12 " in line
    details = json_output("files", "show", file.id)
    assert (details["id"], details["tenant"], details["examples"], details["bytes"]) == (
        file.id,
        tenant,
        12,
        len(examples(12)),
    )
    assert "a.jsonl" in ok("files", "show", file.id).stdout
    assert ok("files", "show", file.id, "--content").stdout_bytes == examples(12)
    assert f"{file.id} is deleted." in ok("files", "delete", file.id).stderr
    assert loramill("files", "delete", file.id).exit_code == 1


def test_a_file_that_a_job_needs_is_not_deleted(tenant: str) -> None:
    job = ok("submit", f"{tenant}/a", "--train", table("a.csv", "prompt,completion")).stdout.strip()
    with Client() as client:
        file = client.jobs.get(job).training_file
    refused = loramill("files", "delete", file)
    assert refused.exit_code == 1 and f"the job {job} needs it" in refused.stderr


def test_a_dry_run_shows_what_would_be_trained_and_stores_nothing(tenant: str) -> None:
    table("train.csv", "prompt,completion")
    ran = ok(
        "submit",
        f"{tenant}/a",
        "--train",
        "train.csv",
        "--valid",
        table("valid.csv", "prompt,completion", count=2),
        "--dry-run",
    )
    assert "CSV, prompt and completion (prompt, completion)" in ran.stdout
    assert "what is train.csv 0?\u27e6number 0<|im_end|>\u27e7" in ran.stdout
    assert "Nothing was stored or submitted" in ran.stderr
    Path("chat.jsonl").write_bytes(examples())
    (found,) = json_output("submit", f"{tenant}/a", "--train", "chat.jsonl", "--dry-run")
    assert (found["format"], found["examples"]) == ("JSONL, messages", 12)
    *prompt, answer = found["preview"]
    assert (answer["supervised"], answer["text"]) == (True, "code 0<|im_end|>")
    assert prompt[-1]["text"].endswith("<|im_start|>assistant\n") and not prompt[-1]["supervised"]
    tokens = found["tokens"]
    assert 0 < tokens["min"] <= tokens["median"] <= tokens["max"] < tokens["total"]
    assert 0 < found["supervised_tokens"] < tokens["total"]
    assert json_output("files", "list", "--tenant", tenant) == [] == json_output("jobs", "--tenant", tenant)


def test_a_dry_run_shows_both_answers_of_a_preference(tenant: str) -> None:
    rows = "".join(f"what is {number}?, number {number}, no idea\n" for number in range(12))
    Path("pairs.csv").write_text("prompt,chosen,rejected\n" + rows)
    arguments = ("submit", f"{tenant}/a", "--train", "pairs.csv", "--dry-run")
    ran = ok(*arguments, "--objective", "dpo", "--beta", "0.2")
    assert "CSV, preferences (chosen, rejected, prompt)" in ran.stdout
    lines = ["what is 0?\u27e6 number 0<|im_end|>\u27e7", "what is 0?\u27e6 no idea<|im_end|>\u27e7"]
    assert "\n".join(lines) in ran.stdout
    refused = loramill(*arguments)
    assert refused.exit_code == 1 and "set 'objective' to 'dpo' or 'orpo'" in refused.stderr


def test_a_dry_run_escapes_control_characters(tenant: str) -> None:
    row = '{"prompt": "a\\u001b[31mb\\u202ec\\td", "completion": "e%d\\u0000"}\n'
    Path("train.jsonl").write_text("".join(row % number for number in range(12)))
    output = ok("submit", f"{tenant}/a", "--train", "train.jsonl", "--dry-run").stdout
    assert r"a\x1b[31mb\u202ec" in output and "\td" in output and r"e0\x00" in output
    assert not {"\x1b", "\u202e", "\x00"} & set(output)


def test_a_dry_run_reports_refusals(tenant: str) -> None:
    few = loramill("submit", f"{tenant}/a", "--train", table("few.csv", "prompt,completion", count=3), "--dry-run")
    assert few.exit_code == 1 and "few.csv: it has 3 examples, and at least 10 are needed" in few.stderr
    table("train.csv", "prompt,completion")
    long = loramill("submit", f"{tenant}/a", "--train", "train.csv", "--max-length", "8", "--dry-run")
    assert long.exit_code == 1 and "train.csv, row 1: it has" in long.stderr and "the limit is 8" in long.stderr
    sweep = loramill("submit", f"{tenant}/a", "--train", "train.csv", "--sweep", "rank=4,8", "--dry-run")
    assert sweep.exit_code == 1 and "give a validation file" in sweep.stderr
    for arguments in (["--file", "jobs.toml"], [f"{tenant}/a"]):
        assert loramill("submit", *arguments, "--dry-run").exit_code == 2
