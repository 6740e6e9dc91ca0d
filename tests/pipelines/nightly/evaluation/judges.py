"""A judge on a real port: an OpenAI endpoint that grades by a function of the test."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Status and answer for the body of a request.
Grade = Callable[[dict[str, Any]], tuple[int, str]]


class Judge:
    """What was requested of the endpoint."""

    def __init__(self, grade: Grade) -> None:
        self.grade = grade
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.url = ""


@contextmanager
def judging(grade: Grade, *, as_it_is: bool = False) -> Iterator[Judge]:
    """Serves answers; `as_it_is`: as the texts that `grade` returns, not in OpenAI's format."""
    judge = Judge(grade)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            judge.bodies.append(body)
            judge.keys.add(self.headers["authorization"])
            status, text = judge.grade(body)
            message = {"role": "assistant", "content": text}
            answer: dict[str, Any] = {
                "id": "c",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }
            formatted = json.dumps(answer if status == 200 else {"error": {"message": text}})
            raw = (text if as_it_is else formatted).encode()
            self.send_response(status)
            self.send_header("content-type", "text/html" if text.startswith("<") else "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        judge.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield judge
        server.shutdown()
        thread.join()
