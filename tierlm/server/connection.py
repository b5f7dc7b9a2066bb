"""The connection to a client: notices when it ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request

T = TypeVar("T")
POLL = 0.2  # seconds between two looks at the connection
SILENCE = 15.0  # seconds after which a comment shows the client that the server lives


class Gone(Exception):
    """The client has closed the connection."""


async def attended(request: Request, items: AsyncGenerator[T, None]) -> AsyncIterator[T | None]:
    """``items`` while the client is there, and None after each SILENCE without one. Raises Gone. Closes ``items``."""
    step: asyncio.Future[T] | None = None
    looked = spoke = time.monotonic()
    try:
        while True:
            step = asyncio.ensure_future(anext(items))
            while True:
                done, _ = await asyncio.wait({step}, timeout=POLL)
                now = time.monotonic()
                if now - looked >= POLL:
                    looked = now
                    if await request.is_disconnected():
                        raise Gone
                if done:
                    break
                if now - spoke >= SILENCE:
                    spoke = now
                    yield None
            try:
                item = step.result()
            except StopAsyncIteration:
                return
            spoke = time.monotonic()
            yield item
    finally:
        if step is not None and not step.done():
            step.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await step
        await items.aclose()


def event(content: dict[str, Any] | str, name: str | None = None) -> str:
    """A server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"


COMMENT = ": waiting\n\n"
