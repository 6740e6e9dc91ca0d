"""/v1/adapters: adapters, their versions' files and retention, and data for nightly runs."""

from loramill.serve.api.routes.adapters import adapters, data, files, imports, retention

#: In the order in which the documentation lists their endpoints.
ROUTERS = (adapters.router, data.router, files.router, imports.router, retention.router)
