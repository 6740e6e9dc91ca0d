"""Requests over HTTP: what is sent, and how responses are read."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest

from loramill.errors import DeadlineExceeded, EngineFault
from loramill_bench.http import answers, client, servers
from loramill_bench.http.answers import Run
from loramill_bench.http.client import Server
from loramill_bench.http.workload import OUTPUT_TOKENS, CompletionRequest, Stream


class Scripted:
    """A server that answers requests with the pieces of its scripts in turn, over and over.

    It closes the connection after a script without an end, and after one with `connection: close`.
    """

    def __init__(self, *scripts: Sequence[bytes], pause: float = 0.0) -> None:
        self._scripts, self._pause = itertools.cycle(scripts), pause
        self.requests: list[bytes] = []
        self.open = self.most = self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ended = True
        while ended and (head := await _head(reader)):
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            self.requests.append(head + await reader.readexactly(length))
            self.open += 1
            self.most = max(self.most, self.open)
            script = next(self._scripts)
            for piece in script:
                await asyncio.sleep(self._pause)
                writer.write(piece)
            self.open -= 1
            ended = END in script and b"connection: close" not in script[0]
        writer.close()

    def run(self, *streams: Stream, key: str = "", limit: float = 30.0) -> Run:
        """The run of these streams on this server."""

        async def run_all() -> Run:
            async with await asyncio.start_server(self.serve, "127.0.0.1", 0) as listening:
                port = listening.sockets[0].getsockname()[1]
                return await client._run(Server(port, key), streams, limit)

        return asyncio.run(run_all())


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def http(status: str, body: Sequence[bytes], *headers: str) -> list[bytes]:
    """A chunked response, each piece of its body a chunk."""
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers, "transfer-encoding: chunked", "", ""]).encode()
    return [head, *(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in body), END]


def event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


END = b"0\r\n\r\n"
TOKEN = event('{"choices": [{"text": " a", "finish_reason": null}], "usage": null}')
USAGE = event('{"choices": [], "usage": {"completion_tokens": 64}}')
SHORT = event('{"choices": [], "usage": {"completion_tokens": 63}}')
DONE = event("[DONE]")
GOOD = http("200 OK", [TOKEN, TOKEN, TOKEN, USAGE, DONE])
REQUEST = CompletionRequest("base", "a prompt")


def test_an_answer_is_its_chunks_with_their_times() -> None:
    run = Scripted(GOOD, pause=0.02).run(Stream((REQUEST,)))
    (answer,) = run.answers
    assert (answer.tokens, answer.fault, answer.refused) == (OUTPUT_TOKENS, "", False)
    first, second, third = answer.times
    assert first > 0.03
    assert min(second - first, third - second) > 0.01
    assert third < answer.seconds <= run.seconds
    assert 0 < run.cpu < run.seconds


@pytest.mark.parametrize("cut", [1, 7, 30, 80])
def test_events_may_come_in_any_pieces(cut: int) -> None:
    body = TOKEN + TOKEN + USAGE + DONE
    pieces = [body[at : at + cut] for at in range(0, len(body), cut)]
    (answer,) = Scripted(http("200 OK", pieces)).run(Stream((REQUEST,))).answers
    assert (answer.tokens, len(answer.times), answer.fault) == (OUTPUT_TOKENS, 2, "")


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (http("200 OK", [TOKEN, SHORT, DONE]), "63 tokens instead of 64"),
        (http("200 OK", [TOKEN, USAGE]), "the stream ended before its end"),
        (http("200 OK", [TOKEN, event('{"error": {"message": "lost"}}'), DONE]), "in the stream: {'message': 'lost'}"),
        (http("500 No", [b"broken"]), "HTTP 500: broken"),
        (http("429 Too Many", [b"later"]), "HTTP 429: later"),
        (GOOD[:3], "the connection failed: the server closed the connection"),
        ([], "the connection failed: the server closed the connection"),
    ],
)
def test_an_incomplete_answer_is_a_fault_and_the_stream_continues(script: list[bytes], fault: str) -> None:
    run = Scripted(script, GOOD).run(Stream((REQUEST, REQUEST)))
    assert [answer.fault for answer in run.answers] == [fault, ""]
    assert run.faults == [fault]
    assert run.served == [run.answers[1]]
    assert answers.output_rate(run) == OUTPUT_TOKENS / run.seconds
    with pytest.raises(EngineFault, match="loramill left 1 of 2 requests without a proper answer"):
        answers.check_complete("loramill", [run])


def test_a_429_with_retry_after_is_a_refusal() -> None:
    run = Scripted(http("429 Too Many", [b"later"], "Retry-After: 1")).run(Stream((REQUEST,)))
    assert [answer.refused for answer in run.answers] == [True]
    assert (run.faults, run.served) == ([], [])
    with pytest.raises(EngineFault, match=r"1 of 1 requests.*refused"):
        answers.check_complete("loramill", [run])


def test_requests_without_a_server_are_faults() -> None:
    run = client.run(Server(servers.free_port()), [Stream((REQUEST, REQUEST))])
    assert len(run.faults) == 2
    assert "the connection failed" in run.faults[0]


def test_a_stream_sends_one_request_at_a_time_on_one_connection() -> None:
    server = Scripted(GOOD, pause=0.002)
    run = server.run(*[Stream((REQUEST,) * 5)] * 3)
    assert len(run.served) == 15
    assert (server.most, server.connections) == (3, 3)


def test_a_closed_connection_is_replaced_by_another() -> None:
    server = Scripted([b"HTTP/1.1 200 OK\r\nconnection: close\r\n" + GOOD[0][17:], *GOOD[1:]])
    assert len(server.run(Stream((REQUEST,) * 3)).served) == 3
    assert server.connections == 3


def test_arrivals_wait_for_their_time_and_for_no_other_request() -> None:
    server = Scripted(GOOD, pause=0.1)
    run = server.run(*(Stream((REQUEST,), start_seconds=0.1 * number) for number in range(4)))
    assert server.most == 4
    assert run.seconds > 0.3 + 5 * 0.1
    assert all(answer.seconds <= run.seconds - 0.1 * number for number, answer in enumerate(run.answers))


def test_a_run_that_does_not_end_is_aborted() -> None:
    with pytest.raises(DeadlineExceeded, match=r"After 0.2 s 2 requests to http://127.0.0.1:\d+ have not ended"):
        Scripted(GOOD, [b"", *GOOD], pause=0.05).run(Stream((REQUEST, REQUEST, REQUEST)), limit=0.2)


def test_the_key_is_sent_if_there_is_one() -> None:
    server = Scripted(GOOD)
    server.run(Stream((REQUEST,)), key="secret")
    server.run(Stream((REQUEST,)))
    assert [b"authorization: Bearer secret\r\n" in request for request in server.requests] == [True, False]
