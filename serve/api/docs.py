"""GET /docs: FastAPI's Swagger UI, with the assets of an installed package, so that it needs no network."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse, RedirectResponse, Response

_ASSETS = "/docs/assets"
_SCRIPT, _STYLE = f"{_ASSETS}/swagger-ui-bundle.js", f"{_ASSETS}/swagger-ui.css"

#: Paths that need no API key.
PATHS = frozenset({"/", "/favicon.ico", "/docs", "/openapi.json", _SCRIPT, _STYLE})

_router = APIRouter(include_in_schema=False)


def add_docs(app: FastAPI) -> None:
    """Adds the page, its assets, and what browsers request besides."""
    app.include_router(_router)
    app.mount(_ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))


@_router.get("/")
async def root() -> RedirectResponse:
    """Redirects browsers to the documentation."""
    return RedirectResponse("docs")


@_router.get("/favicon.ico")
async def favicon() -> Response:
    """There is no icon; browsers remember this for a day."""
    return Response(status_code=204, headers={"cache-control": "max-age=86400"})


@_router.get("/docs")
async def docs() -> HTMLResponse:
    """The documentation. Its links are relative, so that it also works behind a path prefix."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="loramill",
        swagger_js_url=_SCRIPT.removeprefix("/"),
        swagger_css_url=_STYLE.removeprefix("/"),
        swagger_favicon_url="favicon.ico",
        swagger_ui_parameters={"persistAuthorization": True},
    )
