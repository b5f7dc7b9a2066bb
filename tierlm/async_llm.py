"""The public API for asyncio: the same engine thread, whose mailboxes wake an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from tierlm.answer import Piece, Result, add, results, unfinished
from tierlm.checkpoints.hub import find_model
from tierlm.client import Client, Request
from tierlm.config import Budget, LoadOptions, SamplingParams
from tierlm.engine.sequence import Keep, Pace, Progress
from tierlm.live import Live
from tierlm.llm import LLM, checked
from tierlm.prompt import Prompt, Prompts
from tierlm.stats import Stats
from tierlm.templates.template import Message
from tierlm.text import TextCodec
from tierlm.worker import News

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue from the engine thread to the running event loop."""

    def __init__(self) -> None:
        self._items: SimpleQueue[T] = SimpleQueue()
        self._loop, self._filled = asyncio.get_running_loop(), asyncio.Event()

    def put(self, item: T, /) -> None:
        self._items.put(item)
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._filled.set)

    def empty(self) -> bool:
        return self._items.empty()

    async def get(self) -> T:
        while True:
            self._filled.clear()
            with suppress(Empty):
                return self._items.get_nowait()
            await self._filled.wait()


class AsyncLLM:
    """As ``LLM``, for asyncio. Cancelling a task, or leaving ``async for``, ends its request.

    Use one from one event loop; requests of several tasks run together. Its calls raise what those of ``LLM`` raise.
    """

    def __init__(self, llm: LLM):
        self._llm = llm

    @classmethod
    async def load(
        cls,
        model: str | Path,
        *,
        budget: Budget | str | int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[LoadOptions],
    ) -> AsyncLLM:
        """As ``LLM.load``. ``progress`` is called in the event loop."""
        limits, chosen = checked(budget, options)
        folder = await asyncio.to_thread(find_model, model, whole=False)
        news = Mailbox[News]()
        client = Client(folder, limits, chosen, news)
        try:
            client.start()
            while (runtime := client.loaded(item := await news.get())) is None:
                if progress is not None and isinstance(item, tuple):
                    progress(*item)
            return cls(LLM(client, runtime, folder))
        except BaseException:
            client.abandon()
            raise

    async def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Result]:
        answers, request = self._llm._generation(Mailbox[Progress](), prompts, params)
        try:
            request.submit()
            while unfinished(answers):
                add(answers, request, await _next(request))
        finally:
            request.cancel()
        return results(answers)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        keep: Keep | None = None,
        pace: Pace = Pace.ASKED,
    ) -> AsyncIterator[Piece]:
        """As ``LLM.stream``. ``pace``: EACH generates ahead of the reader."""
        answer, request = self._llm._stream(Mailbox[Progress](), prompt, params, keep, pace)
        try:
            request.submit()
            while answer.finish is None:
                if (piece := answer.piece(await _next(request))) is not None:
                    yield piece
        finally:
            request.cancel()

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[Piece]:
        ids = await asyncio.to_thread(self.codec.chat, messages, tools, template_args)
        async with aclosing(self.stream(ids, params)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    async def logits(self, ids: Prompt) -> Tensor:
        out, request = self._llm._logits(Mailbox[Progress](), ids)
        try:
            request.submit()
            await _next(request)
        finally:
            request.cancel()
        return out

    def stats(self) -> Stats:
        return self._llm.stats()

    def live(self) -> Live:
        return self._llm.live()

    def ids(self, prompt: Prompt) -> list[int]:
        return self._llm.ids(prompt)

    @property
    def codec(self) -> TextCodec:
        return self._llm.codec

    @property
    def bug(self) -> BaseException | None:
        return self._llm.bug

    @property
    def context(self) -> int:
        return self._llm.context

    @property
    def vocab(self) -> int:
        return self._llm.vocab

    @property
    def eos(self) -> frozenset[int]:
        return self._llm.eos

    @property
    def default_params(self) -> SamplingParams:
        return self._llm.default_params

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _next(request: Request[Mailbox[Progress]]) -> Progress:
    request.ask()
    return request.checked(await request.mailbox.get())
