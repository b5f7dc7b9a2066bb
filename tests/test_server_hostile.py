"""The HTTP server and those who mean no good: what they send gets a status below 500, and nothing is left of them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install tierlm[serve]")
from test_server import MESSAGES, OPTIONS, PROMPT, Running, running, wait_for

from tierlm.server.service import Limits

HALF = "\ud800"  # of a surrogate pair: a string in JSON and in Python, which no encoding can write
DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
COMPLETION = {"model": "demo", "prompt": "a", "max_tokens": 1}
CHAT = {"model": "demo", "messages": MESSAGES, "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(Limits(requests=128, body=2**20), options=OPTIONS) as server:
        yield server


def idle(served: Running) -> None:
    """Nothing is left of the requests so far, and the next one is answered."""
    scheduler = served.service.llm._llm._loaded().scheduler
    wait_for(lambda: served.service.live == 0 and scheduler.load == (0, 0))
    assert served.post("/v1/completions", COMPLETION)[0] == 200


@pytest.mark.parametrize(
    "field",
    [
        {"model": HALF},
        {"model": "\0" * 1000},
        {"prompt": HALF},
        {"prompt": f"a{HALF}b\0"},
        {"prompt": [-1]},
        {"prompt": [10**30]},
        {"prompt": [[]]},
        {"prompt": [[1], "a"]},
        {"prompt": DEEP},
        {"max_tokens": -(10**30)},
        {"max_tokens": 1.5},
        {"temperature": 10**400},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": -float("inf")},
        {"seed": 10**30},
        {"n": -1},
        {"n": 10**30},
        {"priority": 10**30},
        {"logit_bias": {"9" * 5000: 1}},
        {"logit_bias": {"9" * 100: 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {HALF: 1}},
        {"logit_bias": {"1": float("nan")}},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {HALF: 1},
        {"a.b\0": DEEP},
    ],
    ids=lambda field: f"{next(iter(field.items()))!a:.30}",
)
def test_wrong_completions(served: Running, field: dict[str, Any]) -> None:
    status, _, content = served.post("/v1/completions", {**COMPLETION, **field})
    assert 400 <= status < 500 and content["error"]["message"]


@pytest.mark.parametrize("field", [{"stop": HALF}, {"user": HALF}, {"metadata": {HALF: DEEP}}, {"max_tokens": 10**300}])
def test_odd_and_harmless(served: Running, field: dict[str, Any]) -> None:
    assert served.post("/v1/completions", {**COMPLETION, **field})[0] == 200


@pytest.mark.parametrize(
    "field",
    [
        {"messages": [{"role": HALF, "content": "a"}]},
        {"messages": [{"role": 5, "content": "a"}]},
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": [DEEP]}]},
        {"messages": [{"role": "user", "content": [{"type": HALF}]}]},
        {"messages": [{"role": "assistant", "tool_calls": DEEP}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": HALF, "arguments": "{"}}]}]},
        {"tools": DEEP},
        {"tools": [{**TOOL, "type": HALF}]},
        {"tools": [TOOL] * 3},
        {"tool_choice": "required"},
        {"response_format": {"type": HALF}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": HALF}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"anyOf": DEEP}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {"top_logprobs": 10**30, "logprobs": True},
    ],
    ids=lambda field: f"{next(iter(field.items()))!a:.70}",
)
def test_wrong_chats(served: Running, field: dict[str, Any]) -> None:
    for path, known in (("/v1/chat/completions", True), ("/v1/messages", "messages" in field)):
        status, _, content = served.post(path, {**CHAT, **field})
        assert 400 <= status < 500 and content["error"]["message"], (path, content)
        assert known or status == 400


@pytest.mark.parametrize("field", [{"chat_template_kwargs": {HALF: HALF}}, {"chat_template_kwargs": {"deep": DEEP}}])
def test_odd_variables_of_a_template(served: Running, field: dict[str, Any]) -> None:
    assert served.post("/v1/chat/completions", {**CHAT, **field})[0] < 500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "demo", "prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
        b'{"model": "demo", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "demo", "prompt": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"model": "demo", "prompt": "a", "model": "x"}',
        b"\0" * 1000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bodies_that_are_none(served: Running, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
        status, _, content = served.post(path, body)
        assert 400 <= status < 500 and content["error"]["message"]


@pytest.mark.parametrize(
    "lines",
    [
        ["origin: http://["],
        ["origin: \xff"],
        ["host: ["],
        ["host: [::1"],
        ["content-length: -1"],
        ["content-length: " + "9" * 30],
        ["content-length: ²"],
        ["content-type: application/json; charset=\xff"],
        ["content-type: multipart/form-data"],
        ["content-encoding: gzip"],
        ["authorization: Bearer \xff"],
        ["x: " + "y" * 200_000],
        [f"x{at}: y" for at in range(20_000)],
        ["x y: z"],
    ],
    ids=lambda lines: f"{lines[0]!a:.40}",
)
def test_odd_headers(served: Running, lines: list[str]) -> None:
    body = json.dumps(COMPLETION).encode()
    own = [] if any(line.startswith("host") for line in lines) else ["host: localhost"]
    own += [] if any(line.startswith("content-l") for line in lines) else [f"content-length: {len(body)}"]
    own += [] if any(line.startswith("content-t") for line in lines) else ["content-type: application/json"]
    status = raw(served, "\r\n".join(["POST /v1/completions HTTP/1.1", *own, *lines]), body)
    assert status is None or status < 500
    idle(served)


@pytest.mark.parametrize("path", ["/v1/models/%ff", "/v1/models/" + "a" * 60_000, "/%00", "//", "/v1/../../etc/passwd"])
def test_odd_paths(served: Running, path: str) -> None:
    status = raw(served, f"GET {path} HTTP/1.1\r\nhost: localhost", b"")
    assert status is not None and 400 <= status < 500


def raw(served: Running, head: str, body: bytes) -> int | None:
    """The status of the reply; None if the connection ends without one."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        try:
            connection.sendall(head.encode("latin-1", "replace") + b"\r\n\r\n" + body)
            connection.shutdown(socket.SHUT_WR)
            line = connection.makefile("rb").readline()
        except OSError:  # it has hung up
            return None
    return int(line.split()[1]) if line else None


def test_a_hundred_clients_that_vanish(served: Running) -> None:
    """At once: before they have sent anything, in the middle of it, and after it, streamed or whole."""

    def vanish(count: int) -> None:
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 390, "ignore_eos": True, "stream": count % 2 == 0}
        data = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(data)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall((head + data)[: [0, 50, len(head) + 20, None, None][count % 5]])

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(vanish, range(100)))
    idle(served)


def test_a_reader_that_stops_reading(served: Running) -> None:
    """Its stream ends all the same, and others are answered meanwhile."""
    data = json.dumps(
        {"model": "demo", "prompt": PROMPT, "max_tokens": 390, "ignore_eos": True, "stream": True}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(head + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        assert served.post("/v1/completions", COMPLETION)[0] == 200
        scheduler = served.service.llm._llm._loaded().scheduler
        wait_for(lambda: scheduler.load == (0, 0))
    idle(served)


def test_a_bug_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A balancer must know that nothing is answered any more."""
    with running(Limits(), options=OPTIONS) as server:
        assert server.get("/health")[0] == 200
        scheduler = server.service.llm._llm._loaded().scheduler

        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("made up")

        monkeypatch.setattr(scheduler, "step", fail)
        status, _, content = server.post("/v1/completions", COMPLETION)
        assert status == 500 and "this is a bug in tierlm" in content["error"]["message"]
        status, text = server.get("/health")
        assert status == 503 and json.loads(text) == {"model": "demo", "status": "failed"}
        assert json.loads(server.get("/live")[1]) == {"model": "demo", "status": "failed"}
        assert server.get("/stats")[0] == server.get("/metrics")[0] == 200
        assert server.post("/v1/completions", COMPLETION)[0] == 500
