"""The application as Ray Serve's own tools take it: `serve build loramill.serve.application:app`, `serve deploy`.

Importing it reads the settings, those of `LORAMILL_*` variables included.
"""

from __future__ import annotations

from loramill.serve.deployments import application
from loramill.settings import Settings

app = application(Settings.load())
