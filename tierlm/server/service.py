"""Runs the requests of an HTTP server on one model: admission, time limits, measurements."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal
from weakref import WeakSet

from tierlm.answer import Piece
from tierlm.async_llm import AsyncLLM
from tierlm.config import Budget, LoadOptions, SamplingParams
from tierlm.engine.sequence import Keep, Pace
from tierlm.errors import TierlmError, UsageError
from tierlm.server.grammar import Grammars
from tierlm.server.metrics import Metrics
from tierlm.server.tools import Tools


@dataclass(frozen=True)
class Limits:
    """``requests``: live at a time, running or waiting; more are refused. ``seconds``: of one request. ``body``: bytes
    of a request."""

    requests: int = 64
    seconds: float = 600.0
    body: int = 8 * 2**20


class Busy(Exception):
    """The server has as many requests as it accepts. ``after``: seconds until there may be room."""

    def __init__(self, after: int):
        super().__init__(f"all places for requests are taken; try again in {after} s")
        self.after = after


class UnknownModel(Exception):
    """A request for a model that is not served here."""


class NotReady(Exception):
    """The model is being loaded."""


class TimedOut(Exception):
    """A request took longer than the server allows."""


@dataclass(eq=False)
class Work:
    """What a request is for: prompts of ids, and the parameters of their sequences. ``cached``: prompt tokens that were
    not computed, known with the first tokens of the answers."""

    prompts: Sequence[list[int]]
    params: SamplingParams
    began: float = field(default_factory=time.monotonic)
    cached: int = 0

    def sequences(self) -> list[tuple[list[int], SamplingParams]]:
        return [(ids, one) for ids in self.prompts for one in self.params.samples()]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class Service:
    """A model behind HTTP. ``name``: its id in the API."""

    def __init__(self, name: str, limits: Limits):
        self.name, self.limits, self.metrics = name, limits, Metrics(lambda: self.live)
        self.created = int(time.time())
        self.loading: tuple[int, int] = (0, 0)
        self.failure: Exception | None = None
        self._llm: AsyncLLM | None = None
        self._keep = Keep()
        self._live = WeakSet[Work]()  # weak, since a client may be gone before its work begins
        self._durations: deque[float] = deque(maxlen=32)  # seconds of the latest requests

    async def load(self, model: str, budget: Budget, options: LoadOptions) -> None:
        """Load the model. An error is kept as ``failure`` too, for whoever started the server."""
        try:
            self._llm = await AsyncLLM.load(model, budget=budget, progress=self._progress, **options)
            self.metrics.watch(self._llm)
        except Exception as error:
            self.failure = error
            raise

    def _progress(self, done: int, total: int) -> None:
        self.loading = done, total

    @property
    def llm(self) -> AsyncLLM:
        """The model. Raises NotReady."""
        if self._llm is None:
            raise NotReady("the model is being loaded")
        return self._llm

    @cached_property
    def grammars(self) -> Grammars:
        """Of the model. Raises NotReady, UsageError."""
        return Grammars(self.llm.codec, self.llm.vocab, self.llm.eos)

    def check(self, name: str) -> None:
        """Raises UnknownModel unless ``name`` is the model's."""
        if name != self.name:
            raise UnknownModel(f"the model {name[:100]!r} is not served here: expected {self.name!r}")

    @property
    def status(self) -> Literal["loading", "ready", "failed"]:
        """Failed: it cannot be loaded, or a bug in tierlm has closed it."""
        if self._llm is None:
            return "loading" if self.failure is None else "failed"
        return "ready" if self._llm.bug is None else "failed"

    @property
    def ready(self) -> bool:
        return self.status == "ready"

    def state(self) -> dict[str, str | int]:
        """Model and status, in plain types."""
        done, total = self.loading
        progress = {"loaded_bytes": done, "of_bytes": total} if self.status == "loading" else {}
        return {"model": self.name, "status": self.status, **progress}

    @property
    def live(self) -> int:
        """Requests that run or wait."""
        return len(self._live)

    async def close(self) -> None:
        if self._llm is not None:
            await self._llm.close()

    async def force(self, work: Work, tools: Tools | None, name: str | None) -> None:
        """Make the answer one call, of the function ``name``, or of any. Raises UsageError."""
        if tools is None:
            raise UsageError("tool_choice: expected tools to choose from, found none")
        form, functions = tools.chosen(name)
        constraint = await asyncio.to_thread(lambda: self.grammars.call(form, functions))
        work.params = replace(work.params, constraint=constraint)

    def admit(self, work: Work) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all sequences of ``work``, as they come, with the number of the sequence.

        Closing the iterator drops the sequences within a step. Raises Busy; the iterator raises TimedOut, and what
        ``AsyncLLM`` raises.
        """
        if len(self._live) >= self.limits.requests:
            self.metrics.refused.inc()
            raise Busy(self._wait())
        self._live.add(work)
        return self._run(work)

    async def _run(self, work: Work) -> AsyncGenerator[tuple[int, Piece], None]:
        outcome = "cancelled"
        try:
            async with aclosing(self._merged(work)) as pieces:
                async for place, piece in pieces:
                    yield place, piece
            outcome = "done"
        except TierlmError:
            outcome = "error"
            raise
        except TimedOut:
            outcome = "timeout"
            raise
        finally:
            self._live.discard(work)
            self._durations.append(time.monotonic() - work.began)
            self.metrics.requests.labels(outcome).inc()
            self.metrics.prompt_tokens.inc(work.prompt_tokens)
            self.metrics.cached_tokens.inc(work.cached)

    def _wait(self) -> int:
        """Seconds until a request of average length ends, if they end evenly."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
        return max(1, math.ceil(mean / self.limits.requests))

    async def _merged(self, work: Work) -> AsyncGenerator[tuple[int, Piece], None]:
        arrived: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

        async def follow(place: int, ids: list[int], params: SamplingParams) -> None:
            try:
                async with aclosing(self.llm.stream(ids, params, keep=self._keep, pace=Pace.EACH)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        arrived.put_nowait((place, piece))
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(follow(place, *one)) for place, one in enumerate(work.sequences())]
        clocks = [Clock(self.metrics, work.began) for _ in tasks]
        try:
            left = len(tasks)
            while left:
                remaining = work.began + self.limits.seconds - time.monotonic()
                try:
                    item = await asyncio.wait_for(arrived.get(), max(0.0, remaining))
                except TimeoutError:
                    raise TimedOut(f"not done after {self.limits.seconds:g} s") from None
                if isinstance(item, BaseException):
                    raise item
                place, piece = item
                if clocks[place].first and place % work.params.n == 0:  # of the samples of a prompt, the first counts
                    work.cached += piece.cached
                clocks[place].count(len(piece.ids))
                left -= piece.finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Clock:
    """Measures one sequence: time to its first token, and time between tokens."""

    def __init__(self, metrics: Metrics, began: float):
        self.metrics, self.last, self.first = metrics, began, True

    def count(self, tokens: int) -> None:
        """New tokens have arrived."""
        if not tokens:
            return
        now = time.monotonic()
        self.metrics.new_tokens.inc(tokens)
        if self.first:
            self.metrics.first_token.observe(now - self.last)
        else:
            self.metrics.next_token.observe((now - self.last) / tokens)
        self.first, self.last = False, now
