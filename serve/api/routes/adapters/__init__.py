"""/v1/adapters: adapters, their versions' files, and data for nightly runs."""

from loramill.serve.api.routes.adapters import adapters, data, files, imports

#: In the order in which the documentation lists their endpoints.
ROUTERS = (adapters.router, data.router, files.router, imports.router)
