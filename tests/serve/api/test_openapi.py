"""The OpenAPI description is true: the gateway accepts what it allows, and every answer is one that it describes.

Schemathesis sends every operation requests that the description allows and that it forbids, as an admin, as a tenant
and without a key; the same requests in every run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from copy import deepcopy
from datetime import timedelta
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from loramill.names import AdapterName
from loramill.registry import adapters, datasets, jobs, tenants
from loramill.registry.feedback import completions
from loramill.serve.api.middleware.authentication import OPEN_PATHS
from loramill.submission.dataset_checks import DATA_FILE
from loramill.types import CompletionKind, CompletionRecord, CompletionStorage, JobSpec, VersionRecord

from ...loramill.registry.waiting_challengers import ask
from .routes.adapters.test_adapter_imports import form

Json = dict[str, Any]

#: Requests of each kind (allowed, forbidden) that are drawn at random for an operation, besides the systematic ones.
DRAWN = 4
#: Deletions of what later requests need.
SPARED = ("DELETE /v1/a", "DELETE /v1/c", "DELETE /v1/m", "DELETE /v1/t")
#: Values that mean false where a boolean may be absent (0 is not one, although it equals False).
ABSENT: tuple[Any, ...] = (None, False)

#: The description can't express whether a well-formed request makes sense; and GET …/jobs/batch is for a job "batch".
UNDECIDED = [positive_data_acceptance, unsupported_method]

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "one two"}]}
#: A request that succeeds, for each operation that takes a body; in this order, and each other one without a body.
REQUESTS: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"json": {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}},
    "POST /v1/completions": {"json": {"model": "tiny", "prompt": ["one", "two"], "logprobs": 1}},
    "POST /v1/fine_tuning/jobs/{job_id}/pause": {},
    "POST /v1/fine_tuning/jobs/{job_id}/resume": {},
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": {},
    "POST /v1/fine_tuning/jobs/{job_id}/retry": {},
    "POST /v1/adapters/{tenant}/{adapter}/promote": {"json": {"version": "previous"}},
    "POST /v1/adapters/{tenant}/{adapter}/rollback": {},
    "POST /v1/adapters/{tenant}/{adapter}/retention": {"json": {"retention": {"version_days": 1.5}}},
    "POST /v1/chat/completions/{completion_id}": {"json": {"metadata": {"a": "b"}}},
    "POST /v1/tenants/{tenant}/storage": {"json": {"store_completions": True, "completion_days": "default"}},
    "POST /v1/tenants": {"json": {"name": "described"}},
    "POST /v1/tenants/batch": {"json": {"tenants": [{"name": "listed", "weight": 2}], "keys": True}},
    "POST /v1/tenants/{tenant}/share": {"json": {"weight": 2.0, "max_queued": "unlimited"}},
    "POST /v1/tenants/{tenant}/limits": {"json": {"requests_per_minute": 1000, "stored_bytes": "unlimited"}},
    "DELETE /v1/feedback/{completion_id}": {},
    "DELETE /v1/chat/completions/{completion_id}": {},
    "DELETE /v1/feedback": {"params": {"user": "ann"}},
    "DELETE /v1/adapters/{tenant}/{adapter}/versions/{version}": {"params": {"force": "true"}},
    "DELETE /v1/models/{model}": {},
    "DELETE /v1/adapters/{tenant}/{adapter}": {"params": {"cancel_jobs": "true"}},
    "DELETE /v1/tenants/{tenant}": {"params": {"cancel_jobs": "true"}},
}


def operations(description: Json) -> Iterator[tuple[str, Json]]:
    """Each operation with its name, such as `GET /v1/models`."""
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def stored(tenant: str, kind: CompletionKind) -> CompletionRecord:
    """A stored completion."""
    chat = kind is CompletionKind.CHAT
    message = {"role": "assistant", "content": "hello", "refusal": None}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
    response = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{tenant}",
        "object": str(kind),
        "created": 1,
        "model": "tiny",
        "system_fingerprint": "f",
        "choices": [choice | ({"message": message} if chat else {"text": "hello"})],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
    request = {"messages": CHAT["messages"], "tools": []} if chat else {"prompts": ["hi"], "n": 1, "echo": False}
    return CompletionRecord(
        id=response["id"],
        kind=kind,
        tenant=tenant,
        adapter=None,
        version=None,
        model="tiny",
        user="ann",
        request=request,
        response=response,
        created_at=1e9,
    )


@pytest.fixture
def known(site: Any, tenant: str, jsonl: Any) -> dict[str, list[Any]]:
    """Names that exist, by parameter: a tenant with files, a job, an adapter of two versions."""
    name = AdapterName(tenant, "support")
    versions = [site.registry.artifacts.put({"a.bin": f"{tenant} {number}".encode()}) for number in range(2)]
    data = site.registry.artifacts.put({DATA_FILE: jsonl(8, tenant)})
    with site.registry.writing() as session:
        used, free = (datasets.create(session, tenant, f"{word}.jsonl", data, 1, 8).id for word in ("used", "free"))
        spec = JobSpec(base=site.base.fingerprint, adapter=str(name), train=used, steps=1, batch_size=1)
        job = jobs.submit(session, spec, {}).id
        adapters.get_or_create(session, name)
        for version in versions:
            made = {"id": version, "adapter": str(name), "base": spec.base, "bytes": 1, "created_at": time.time()}
            adapters.add_version(session, VersionRecord(**made, job=None))
            adapters.promote(session, name, version, "to have a previous one")
        tenants.set_storage(session, tenant, CompletionStorage(store_completions=True))
        run = ask(session, name, versions[0], versions[1]).run
        completions.add_many(session, [stored(tenant, CompletionKind.CHAT), stored(tenant, CompletionKind.TEXT)])
    return {
        "tenant": [tenant],
        "adapter": [name.adapter],
        "model": ["tiny", f"{name}@previous"],
        "completion_id": [f"chatcmpl-{tenant}"],
        "text_completion_id": [f"cmpl-{tenant}"],
        "file_id": [free, used, f"file-results-{job}"],
        "training_file": [used],
        "file": ["a.bin"],
        "job_id": [job],
        "run": [run],
        "version": ["champion", versions[1][:8]],
    }


@pytest.fixture
def description(site: Any) -> dict[str, Any]:
    with site.http() as http:
        return dict(http.get("/openapi.json").json())


def test_everything_is_described(description: dict[str, Any]) -> None:
    for name, operation in operations(description):
        assert operation["tags"] and operation["summary"] and operation["description"], name
        for parameter in operation.get("parameters", ()):
            assert "$ref" in parameter or parameter["description"], f"{name}: {parameter['name']}"
        for media, content in operation["responses"]["200"]["content"].items():
            body_schema = content["schema"]
            assert (
                "$ref" in body_schema
                or body_schema.get("properties")
                or body_schema.get("format")
                or media.startswith("text/plain")
            ), f"{name} answers {media}, which its `responses` do not describe"
        refusals = operation["responses"].keys() - {"200"}
        if name.partition(" ")[2] in OPEN_PATHS:
            assert (refusals, operation["security"]) == ({"500", "503"}, [])
        else:
            assert refusals >= {"400", "401", "403", "404", "409", "413", "429", "500", "503"}, name
    assert description["security"] == [{"key": []}]
    for name, schema in description["components"]["schemas"].items():
        # A name with underscores is FastAPI's for one of two models of the same name.
        assert schema["description"] and "__" not in name, name
        for field, about in schema.get("properties", {}).items():
            assert about["description"][0].isupper() and about["description"].endswith((".", "`")), f"{name}.{field}"


def test_values_without_effect_are_described(description: dict[str, Any]) -> None:
    properties = description["components"]["schemas"]["ChatRequest"]["properties"]
    assert properties["service_tier"]["anyOf"] == [{"enum": ["auto", "default", None]}]
    assert properties["seed"]["anyOf"][-1] == properties["temperature"]["anyOf"][-1] == {"type": "null"}
    assert properties["temperature"]["default"] == 1.0


def test_every_operation_answers_as_described(
    site: Any, tenant: str, known: dict[str, list[Any]], description: dict[str, Any], jsonl: Any
) -> None:
    api, todo = schemathesis.openapi.from_dict(description), dict(operations(description))
    with site.http(site.admin_key, **{"openai-organization": tenant}) as http:
        file, job = (
            known["training_file"][0],
            {"model": "tiny", "training_file": known["training_file"][0], "suffix": "s"},
        )
        key = http.post(f"/v1/tenants/{tenant}/keys").json()["id"]
        valid_requests = REQUESTS | {
            "POST /v1/feedback": {"json": {"completion_id": known["completion_id"][0], "rating": 1}},
            "POST /v1/files": {"data": {"purpose": "fine-tune"}, "files": {"file": ("new.jsonl", jsonl(9))}},
            "POST /v1/files/check": {"files": {"file": ("new.jsonl", jsonl(12))}},
            "POST /v1/fine_tuning/jobs": {"json": job},
            "POST /v1/fine_tuning/jobs/batch": {"json": {"jobs": [job, job | {"model": "no"}], "check_only": True}},
            "POST /v1/adapters/{tenant}/{adapter}/import": {"files": form()},
            "POST /v1/adapters/{tenant}/{adapter}/data": {"json": {"training_file": file}},
            "POST /v1/adapters/{tenant}/{adapter}/rename": {"json": {"to": f"{tenant}/{known['adapter'][0]}"}},
            "POST /v1/adapters/{tenant}/{adapter}/approval": {
                "json": {"run": known["run"][0], "decision": "reject", "note": "no"}
            },
            "POST /v1/adapters/{tenant}/{adapter}/canary": {"json": {"share": 0.1, "version": "previous"}},
        }
        site.publish(f"{tenant}/spare", f"{tenant} spare")
        deleted = {"model": f"{tenant}/spare", "version": "previous"}
        parameter_values = {name: values[0] for name, values in known.items()} | {"key_id": key}
        for name in sorted(
            todo,
            key=lambda name: (
                name.startswith("DELETE"),
                list(valid_requests).index(name) if name in valid_requests else -1,
            ),
        ):
            method, _, path = name.partition(" ")
            parameters = parameter_values | deleted if method == "DELETE" else parameter_values
            answer = http.request(method, path.format(**parameters), **valid_requests.get(name, {}))
            answer.request.read()
            assert answer.status_code == 200, f"{name}: REQUESTS should have one that succeeds, not {answer.text}"
            api[path][method].validate_response(answer)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_are_as_described(site: Any, http: httpx.Client, description: dict[str, Any], path: str) -> None:
    api = schemathesis.openapi.from_dict(description)
    body = REQUESTS[f"POST {path}"]["json"] | {"stream": True, "stream_options": {"include_usage": True}}
    answer = http.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.text.count("data: ") > 3
    api[path]["POST"].validate_response(answer)
    for written, instead in (('"choices"', '"chosen"'), ("[DONE]", "[OVER]"), ('"created":', '"created":1.5,"c":')):
        wrong = httpx.Response(
            200, headers=answer.headers, content=answer.text.replace(written, instead).encode(), request=answer.request
        )
        wrong.elapsed = timedelta(0)
        with pytest.raises(Failure):
            api[path]["POST"].validate_response(wrong)


def test_the_page_needs_no_key_and_no_network(site: Any, description: dict[str, Any]) -> None:
    with site.http() as http:
        answer = http.get("/docs")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    links = re.findall(r"(?:src|href)=\"([^\"]*)\"|url: '([^']*)'", answer.text)
    with site.http() as http:
        for link in map("".join, links):
            assert http.get(urljoin(f"{site.url}/docs", link)).is_success, link
            assert "//" not in link and not link.startswith("/"), "a gateway may have a path prefix"
    assert len(links) == 4


@pytest.mark.parametrize("admin", [True, False], ids=["admin", "tenant"])
def test_no_answer_is_undescribed(
    site: Any, tenant: str, known: dict[str, list[Any]], description: dict[str, Any], admin: bool
) -> None:
    key = site.admin_key if admin else site.key(tenant)
    headers = {"authorization": f"Bearer {key}", "openai-organization": tenant}
    wrong = failures(site.url, narrowed(description, known), headers, systematic=admin)
    assert not wrong, f"{len(wrong)} answers aren't as described; the first:\n\n" + "\n\n".join(wrong[:5])


def test_nothing_is_answered_without_a_key(site: Any, known: dict[str, list[Any]], description: dict[str, Any]) -> None:
    parameter_values = {name: values[0] for name, values in known.items()} | {"key_id": "key-none"}
    with site.http() as http:
        for name, operation in operations(description):
            method, _, path = name.partition(" ")
            answer = http.request(method, path.format(**parameter_values))
            assert answer.status_code == (200 if path in OPEN_PATHS else 401), name
            schemathesis.openapi.from_dict(description)[path][method].validate_response(answer)
            assert ("security" in operation) == (path in OPEN_PATHS)


JOBS = "/v1/fine_tuning/jobs"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", JOBS + "/{job}/events?after=ftevent-" + "9" * 30, None, 400, "after"),
        ("GET", JOBS + "?metadata[%00]=x", None, 400, "metadata[\x00]"),
        ("POST", JOBS, {"metadata": {"why": "\x00"}}, 400, "metadata.why"),
        ("POST", JOBS, {"loramill": {"layers": "0-99999999999"}}, 400, "loramill.layers"),
        ("POST", JOBS, {"loramill": {"layers": "0-9999," * 1000}}, 400, "loramill.layers"),
        ("POST", JOBS, {"loramill": {"priority": "5"}}, 400, "loramill.priority"),
        ("POST", JOBS, {"hyperparameters": {"n_epochs": "5"}}, 400, "hyperparameters.n_epochs"),
        ("POST", "/v1/completions", {"prompt": "x", "best_of": True}, 400, "best_of"),
        ("GET", "/v1/usage?from=0", None, 400, "from"),
        ("POST", "/v1/adapters/{tenant}/nothing/unpin", None, 404, "adapter"),
        ("OPTIONS", "/v1/files", None, 405, None),
    ],
)
def test_past_mistakes_stay_fixed(
    http: httpx.Client, known: dict[str, list[Any]], method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    whole = body and {"model": "tiny", **({"training_file": known["training_file"][0]} if path == JOBS else {}), **body}
    answer = http.request(method, path.format(job=known["job_id"][0], tenant=known["tenant"][0]), json=whole)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert answer.headers.get("allow") == ("GET, POST" if status == 405 else None)


def failures(url: str, description: dict[str, Any], headers: dict[str, str], *, systematic: bool) -> list[str]:
    """Sends requests to every operation; returns one failure per operation and kind, with how to reproduce it."""
    api, wrong = schemathesis.openapi.from_dict(description), {}
    with requests.Session() as session:
        session.trust_env = False
        for result in api.get_all_operations():
            for case in cases(result.ok(), systematic=systematic):
                sensible(case.body)
                answer = case.call(base_url=url, headers=headers, session=session)
                try:
                    case.validate_response(answer, headers=headers, excluded_checks=UNDECIDED)
                except FailureGroup as found:
                    for failure in found.exceptions:
                        about = f"{failure}\n{case.as_curl_command()}\n{answer.status_code} {answer.text[:300]}"
                        wrong.setdefault((case.operation.label, type(failure)), about)
    return list(wrong.values())


def cases(operation: Any, *, systematic: bool) -> Iterator[Any]:
    """Requests to an operation, allowed and forbidden: some at random; if systematic, each parameter's limits too."""
    drawn: list[Any] = []
    for mode in GenerationMode:
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters or operation.query):
            continue  # nothing can be wrong

        @settings(
            max_examples=DRAWN, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(mode))
        def draw(case: Any) -> None:
            drawn.append(case)

        draw()
    if systematic:
        modes, config = list(GenerationMode), operation.schema.config.generation
        yield from operation.schema.iter_coverage_cases(operation, generation_modes=modes, generation_config=config)
    yield from drawn


def sensible(body: Any) -> None:
    """Removes contradictions from a generation's body, so that the rest of it is tested."""
    if not isinstance(body, dict):
        return
    if "max_tokens" in body and "max_completion_tokens" in body:
        fine = isinstance(body["max_tokens"], int) and body["max_tokens"] > 0
        del body["max_tokens" if fine else "max_completion_tokens"]
    if isinstance(body.get("top_logprobs"), int) and any(body.get("logprobs") is each for each in ABSENT):
        body["logprobs"] = True
    if isinstance(body.get("stream_options"), dict) and any(body.get("stream") is each for each in ABSENT):
        body["stream"] = True


def narrowed(description: dict[str, Any], known: dict[str, list[Any]]) -> dict[str, Any]:
    """A description that allows only names that exist, so that more than 404s are tested."""
    description = deepcopy(description)
    for name, operation in operations(description):
        for parameter in operation.get("parameters", ()):
            # Data may be given to an adapter that isn't there yet, and nothing is deleted that later requests need.
            spared = name.endswith("/data") or name.startswith(SPARED)
            # Lists may be filtered by any model and adapter.
            filters = parameter.get("in") == "query" and parameter.get("name") in ("model", "adapter")
            if parameter.get("name") in known and not spared and not filters:
                parameter["schema"] = {"enum": known[parameter["name"]]}
    bodies = ("ChatRequest", "CompletionRequest", "FeedbackRequest", "NewJob", "NewDataRequest", "PromotionRequest")
    for body in bodies:
        properties = description["components"]["schemas"][body]["properties"]
        for name in known.keys() & properties.keys():
            properties[name] = {"enum": known[name]}
    return description
