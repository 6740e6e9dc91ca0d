"""/v1/adapters: adapters, their approvals, canaries, files and retention, and data for nightly runs."""

from loramill.serve.api.routes.adapters import adapters, approvals, canary, data, files, imports, retention

#: In the order in which the documentation lists their endpoints.
ROUTERS = (
    adapters.router,
    approvals.router,
    canary.router,
    data.router,
    files.router,
    imports.router,
    retention.router,
)
