"""GET /docs: the description for people, whole without scripts and without a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from jinja2 import Environment
from starlette.responses import HTMLResponse, RedirectResponse, Response

from loramill.serve.api.openapi import operations

router = APIRouter(include_in_schema=False)

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
{% macro type(schema) -%}
{% if "$ref" in schema %}{% set name = schema["$ref"].split("/") | last %}<a href="#{{ name }}">{{ name }}</a>
{%- elif "anyOf" in schema %}{% for each in schema.anyOf %}{{ type(each) }}{{ " or " if not loop.last }}{% endfor %}
{%- elif "const" in schema %}{{ schema.const | tojson }}
{%- elif "enum" in schema %}{% for each in schema.enum %}{{ each | tojson }}{{ " or " if not loop.last }}{% endfor %}
{%- elif schema.contentSchema %}{{ type(schema.contentSchema) }}
{%- elif schema.properties %}{{ type(schema.properties.data) }}, each an event
{%- elif schema.type == "array" %}list of {{ type(schema["items"] or {}) }}
{%- else %}{{ schema.type or "anything" }}{% endif %}
{%- endmacro %}
{% macro table(rows) %}
<table>
{% for name, schema, about in rows %}
<tr><td><code>{{ name }}</code></td><td>{{ type(schema) }}
{%- if schema.default is defined and schema.default is not none %} = {{ schema.default | tojson }}{% endif %}</td>
<td>{{ about }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ info.title }} {{ info.version }}</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h3 { font: 600 1rem/1.5 ui-monospace, monospace; margin: 1.5rem 0 0 }
p { margin: .2rem 0 }
td { padding: .1rem .8rem .1rem 0; vertical-align: top }
</style>
</head>
<body>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.description }}</p>
<p>A key is sent as <code>Authorization: Bearer lm-…</code>; a “?” marks what may be left out.
For tools: <a href="openapi.json">openapi.json</a>.</p>
{% for tag in tags %}
<h2>{{ tag.name }}</h2>
<p>{{ tag.description }}</p>
{% for name, operation in operations if tag.name in operation.tags %}
<h3>{{ name }}</h3>
<p>{{ operation.about }}</p>
{{ table(operation.asked) }}
{% for media, schema in operation.takes %}
<p>takes {{ type(schema) }} ({{ media }})</p>
{% endfor %}
{% for media, schema in operation.answers %}
<p>answers {{ type(schema) }} ({{ media }})</p>
{% endfor %}
{% endfor %}
{% endfor %}
<h2>objects</h2>
{% for name, object in objects.items() %}
<h3 id="{{ name }}">{{ name }}</h3>
<p>{{ object.about }}</p>
{{ table(object.rows) }}
{% endfor %}
</body>
</html>
""")

_Row = tuple[str, Mapping[str, Any], str]


@router.get("/")
async def root() -> RedirectResponse:
    """Redirects a browser to the description of the API."""
    return RedirectResponse("docs")


@router.get("/favicon.ico")
async def favicon() -> Response:
    """Tells browsers that there is no icon."""
    return Response(status_code=204, headers={"cache-control": "max-age=86400"})


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """One page with everything."""
    described = request.app.openapi()
    return HTMLResponse(
        _PAGE.render(
            info=described["info"],
            tags=described["tags"],
            operations=[(name, _shown(operation)) for name, operation in operations(described)],
            objects={
                name: _shown_object(schema) for name, schema in sorted(described["components"]["schemas"].items())
            },
        )
    )


def _shown(operation: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of an operation."""
    asked = [each for each in operation.get("parameters", ()) if "name" in each]
    return {
        "tags": operation["tags"],
        "about": operation["description"],
        "asked": [_row(each["name"], each["schema"], required=each.get("required", False)) for each in asked],
        "takes": _media(operation.get("requestBody", {})),
        "answers": _media(operation["responses"]["200"]),
    }


def _shown_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of an object."""
    required = schema.get("required", ())
    rows = [_row(name, each, required=name in required) for name, each in schema.get("properties", {}).items()]
    return {"about": schema.get("description", ""), "rows": rows}


def _row(name: str, schema: Mapping[str, Any], *, required: bool) -> _Row:
    return name if required else f"{name}?", schema, schema.get("description", "")


def _media(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(media, each["schema"]) for media, each in content.get("content", {}).items()]
