"""What a request must pass before it is read: key, host, origin, size."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tierlm.server.replies import error

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]
OPEN = ("/", "/health")  # need no key: the page has nothing to hide and asks for one; a load balancer has none


class TooLarge(Exception):
    """The body exceeds the limit."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """An ASGI application in front of ``app``. ``key``: what clients must send; None: nothing. ``local``: accept only
    names of this machine as the host, so that a web page cannot reach the server under a name of its own.
    ``body``: bytes of a request at most."""

    app: App
    key: str | None
    local: bool
    body: int

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await _reply(send, *refusal)
            return
        received, begun = 0, False

        async def counted() -> Message:
            nonlocal received
            message: Message = await receive()
            received += len(message.get("body", b""))
            if received > self.body:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            if not begun:
                await _reply(send, 413, f"the body is larger than {self.body} bytes")

    def _refusal(self, path: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """Status and message for a request that may not pass."""
        host = headers.get(b"host", "")
        if self.local and not is_loopback(_split(f"//{host}").hostname or ""):
            return 403, f"the host {host[:100]!r} is not a name of this machine; start with --host to serve others"
        origin = headers.get(b"origin")
        if origin is not None and _split(origin).netloc != host:
            return 403, f"pages of {origin[:100]!r} may not use this server"
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > self.body:
            return 413, f"the body is larger than {self.body} bytes"
        if self.key is not None and path not in OPEN:
            given = headers.get(b"authorization", "").removeprefix("Bearer ") or headers.get(b"x-api-key", "")
            if not secrets.compare_digest(given.encode(), self.key.encode()):
                return 401, "expected the server's API key, as 'Authorization: Bearer KEY'"
        return None


def _split(url: str) -> SplitResult:
    """The parts of ``url``; empty if it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


async def _reply(send: Any, status: int, message: str) -> None:
    body = json.dumps(error(message, "invalid_request_error")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
