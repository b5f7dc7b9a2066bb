"""A client that sends requests when they are due, and what it asks a server besides."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import openai
from arrivals import Arrival
from outcomes import Outcome

IDS = range(5, 260)  # of prompts: every tokenizer has them, and those of bench/synthetic.py answer with text
PROBES = [Arrival(0.0, 24, 12), Arrival(0.0, 7, 16), Arrival(0.0, 40, 8)]
GONE = 10.0  # seconds in which requests of clients that vanished must leave


class Load:
    """A client of the server at ``url``. ``began``: time.monotonic() of the first arrival."""

    def __init__(self, url: str, model: str, timeout: float):
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout)
        self.model = model
        self.began = time.monotonic()

    async def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Send each request when it is due. Returns when all have ended."""
        self.began = time.monotonic()
        return await asyncio.gather(*(self._at(arrival, number) for number, arrival in enumerate(arrivals)))

    async def send(self, arrival: Arrival, number: int) -> Outcome:
        """Send a request now."""
        outcome = Outcome(arrival.at, arrival.prompt)
        texts: list[str] = []
        try:
            async for chunk in await self._stream(arrival, number):
                if chunk.usage is not None:
                    outcome.tokens = chunk.usage.completion_tokens
                if chunk.choices:
                    outcome.last = time.monotonic() - self.began
                    outcome.first = outcome.first or outcome.last
                    texts.append(chunk.choices[0].text)
            outcome.text, outcome.status = "".join(texts), "ok" if outcome.tokens else "nothing"
        except openai.APIStatusError as error:
            outcome.status = str(error.status_code)
        except openai.APIError as error:  # in the stream, or no connection
            outcome.status = type(error).__name__
        return outcome

    async def vanish(self, arrival: Arrival, number: int, chunks: int) -> None:
        """Send a request and close the connection after some ``chunks``; 0: before the first."""
        await asyncio.sleep(self.began + arrival.at - time.monotonic())
        with contextlib.suppress(openai.APIError, asyncio.TimeoutError):
            await asyncio.wait_for(self._begin(arrival, number, chunks), 0.05 if not chunks else None)

    async def _begin(self, arrival: Arrival, number: int, chunks: int) -> None:
        """Send a request, and leave it after the first ``chunks`` of its answer."""
        async with await self._stream(arrival, number) as stream:
            async for _ in stream:
                chunks -= 1
                if chunks <= 0:
                    return

    async def _at(self, arrival: Arrival, number: int) -> Outcome:
        await asyncio.sleep(self.began + arrival.at - time.monotonic())
        return await self.send(arrival, number)

    async def _stream(self, arrival: Arrival, number: int) -> Any:
        return await self.client.completions.create(
            model=self.model,
            prompt=arrival.ids(number, IDS),
            max_tokens=arrival.output,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )


async def live_requests(url: str) -> int:
    """Requests that the server says it has. -1: it is no tierlm, and does not say."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        try:
            found = await client.get("/live", cast_to=dict[str, Any])
        except openai.NotFoundError:
            return -1
        return int(found["requests"]["live"])


async def all_gone(url: str) -> bool:
    """Whether no request is left, now or soon."""
    end = time.monotonic() + GONE
    while (left := await live_requests(url)) > 0 and time.monotonic() < end:
        await asyncio.sleep(0.2)
    return left <= 0


async def probe(load: Load) -> list[str]:
    """The texts of some requests, one after another."""
    found = []
    for number, arrival in enumerate(PROBES):
        outcome = await load.send(arrival, number)
        found.append(outcome.text if outcome.status == "ok" else outcome.status)
    return found
