"""/v1/chat/completions, /v1/completions and /v1/feedback: stored completions, their ratings and corrections."""

from loramill.serve.api.routes.feedback import feedback, stored

#: In the order in which the documentation lists their endpoints.
ROUTERS = (stored.router, feedback.router)
