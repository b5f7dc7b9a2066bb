"""The public API of a loaded model: text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierlm import client
from tierlm.checkpoints.hub import find_model
from tierlm.client import Client, Request
from tierlm.config import Budget, LoadOptions, RuntimeOptions, SamplingParams, format_size
from tierlm.engine.sequence import Pace, Progress
from tierlm.errors import BudgetError, CheckpointError, PromptError, TierlmError, UsageError
from tierlm.runtime import Runtime
from tierlm.stats import Stats, collect
from tierlm.templates.template import Message
from tierlm.text import TextCodec, TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """New text and its ids. ``finish_reason`` is set on the last piece."""

    text: str
    ids: list[int]
    finish_reason: str | None = None


@dataclass(frozen=True)
class Result:
    """The result of one prompt. ``ids``: generated, including a stop id. ``text``: None without a tokenizer.

    ``finish_reason``: "stop" (a stop id or text), "length" or "error"; "error" also sets ``error``.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    finish_reason: str
    error: TierlmError | None = None


class LLM:
    """A loaded model and context manager, made by ``LLM.load``. It closes when it is dropped.

    Requests may run concurrently, from one thread or several; each gets the tokens it gets alone, but for ties within
    rounding (docs/how-it-works.md). A KeyboardInterrupt ends the call that it comes in, and nothing else. A forked
    process cannot use the model of its parent: it gets a UsageError.
    """

    def __init__(self, client: Client, runtime: Runtime, folder: Path):
        self._client, self._folder = client, folder
        self._runtime: Runtime | None = runtime
        self._codec: TextCodec | None = None
        self._stats: Stats | None = None  # the last, once closed

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        budget: Budget | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[LoadOptions],
    ) -> LLM:
        """Load a model: a folder in Hugging Face layout, a Hub id, or "demo". Nothing is converted or written.

        ``budget``: limits of the process. ``options``: the fields of ``RuntimeOptions``. ``progress`` is called with
        the bytes loaded so far and in total. Raises UsageError, BudgetError, CheckpointError, StorageError.
        """
        chosen, folder = checked_options(options), find_model(model)
        return cls(*client.load(folder, budget or Budget(), chosen, progress), folder)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Result]:
        """Generate for one or several prompts, text or ids. Results are in the order of the prompts.

        Prompts run concurrently if the context has room. A prompt whose reads or arithmetic fail ends with
        finish_reason "error" and the others go on; a single prompt raises its StorageError or NumericsError. Raises
        PromptError.
        """
        params = params or SamplingParams()
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several: Sequence[Prompt] = [prompts] if one else prompts  # type: ignore[list-item, assignment]
        prepared = [self._prepare(prompt, params) for prompt in several]  # check all before any is queued
        answers = [Answer(ids, text) for ids, text in prepared]
        pace = Pace.EACH if params.stop else Pace.END
        request = Request(self._client, SimpleQueue[Progress](), [(answer.prompt, params) for answer in answers], pace)
        try:
            request.submit()
            while any(answer.finish is None for answer in answers):
                progress = request.next()
                answers[progress.place].add(progress)
                if answers[progress.place].stopped:
                    request.cancel_one(progress.place)
        finally:
            request.cancel()
        if len(answers) == 1 and answers[0].error is not None:
            raise answers[0].error
        return [answer.result() for answer in answers]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Generate for one prompt and yield text as it arrives: whole characters, without stop texts.

        Texts are empty for a prompt of ids without a tokenizer. Raises as ``generate``.
        """
        params = params or SamplingParams()
        answer = Answer(*self._prepare(prompt, params))
        request = Request(self._client, SimpleQueue[Progress](), [(answer.prompt, params)], Pace.ASKED)
        try:
            request.submit()
            while answer.finish is None:
                if (piece := answer.piece(request.next())) is not None:
                    yield piece
        finally:
            request.cancel()

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Stream the answer to a conversation, ``[{"role": "user", "content": "..."}, ...]``, with the checkpoint's
        chat template. Raises UsageError if it has none."""
        yield from self.stream(self.codec.chat(messages), params)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token of ``ids``, float32 [T, vocab], for perplexity or comparison with a reference.

        Raises PromptError, StorageError, NumericsError, and BudgetError if the result is too large.
        """
        ids, runtime = self._ids(ids), self._loaded()
        per_token, room = runtime.catalog.spec.vocab * 4, runtime.logits_room
        if len(ids) * per_token > room:
            raise BudgetError(
                f"the logits of {len(ids)} tokens take {format_size(len(ids) * per_token)}, but the ram "
                f"budget has {format_size(room)} left: ask for at most {room // per_token} tokens at a time",
                floor=runtime.ram_budget - room + len(ids) * per_token,
                given=runtime.ram_budget,
                dominant="logits",
            )
        out = torch.empty(len(ids), runtime.catalog.spec.vocab)
        request = Request(self._client, SimpleQueue[Progress](), [(ids, SamplingParams())], Pace.END, out)
        try:
            request.submit()
            progress = request.next()
        finally:
            request.cancel()
        if progress.error is not None:
            raise progress.error
        return out

    def stats(self) -> Stats:
        """Counters since the model was loaded, until it was closed."""
        runtime = self._runtime
        return collect(runtime) if runtime is not None else self._stats  # type: ignore[return-value]

    @property
    def codec(self) -> TextCodec:
        """The tokenizer and chat template of the model. Raises CheckpointError if it has none."""
        if self._codec is None:
            self._codec = TextCodec(self._folder)
        return self._codec

    def close(self) -> None:
        """Stop transfers, free the memory and close the files. A step in another thread is abandoned; live requests
        then raise UsageError. May be called twice. No-op in a forked process."""
        self._client.close()
        if self._runtime is not None:
            self._stats = self.stats()
            self._runtime = None  # its memory

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> Runtime:
        """Raises UsageError if the model is closed, or belongs to another process."""
        self._client.worker.check()
        if self._runtime is None:
            raise UsageError("this model is closed")
        return self._runtime

    def _ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked against vocabulary and context."""
        runtime = self._loaded()
        spec, context = runtime.catalog.spec, runtime.context
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise PromptError("a prompt needs at least one token")
        if wrong := [token for token in ids if not 0 <= token < spec.vocab]:
            raise PromptError(f"token id {wrong[0]} is not in the vocabulary of {spec.vocab}")
        if len(ids) > context:
            more = f"; context={len(ids)} reserves enough" if len(ids) <= spec.max_position else ""
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the context {context} (the model's own: {spec.max_position}){more}"
            )
        return ids

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], TextStream | None]:
        """The ids to run, and the stream that decodes the new ones; None without a tokenizer."""
        ids = self._ids(prompt)
        try:
            return ids, TextStream(self.codec, tuple(params.stop))
        except CheckpointError:
            if isinstance(prompt, str) or params.stop:
                raise
            return ids, None  # ids in, ids out


class Answer:
    """The tokens of one prompt and their text. ``ids``: the new tokens, up to the end of the text."""

    def __init__(self, prompt: list[int], text: TextStream | None):
        self.prompt, self.text = prompt, text
        self.ids: list[int] = []
        self.finish: str | None = None
        self.error: TierlmError | None = None
        self._shown = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended it."""
        return self.text is not None and self.text.stopped

    def add(self, new: Progress) -> str:
        """Add new tokens. Returns the text that is now final."""
        if self.finish is not None:  # computed before the end of the text was found
            return ""
        self.error, found = new.error, ""
        for at, token in enumerate(new.ids, 1):
            self.ids.append(token)
            if self.text is not None and not (new.finish == "stop" and at == len(new.ids)):  # a stop id is not text
                found += self.text.push(token)
                if self.text.stopped:
                    self.finish = "stop"
                    return found + self.text.flush()
        self.finish = new.finish
        return found + self.text.flush() if self.text is not None and self.finish else found

    def piece(self, new: Progress) -> Piece | None:
        """Add new tokens. Returns the piece to show now, if any. Raises StorageError, NumericsError."""
        text = self.add(new)
        if self.error is not None:
            raise self.error
        if not text and self.finish is None and self.text is not None:
            return None
        ids, self._shown = self.ids[self._shown :], len(self.ids)
        return Piece(text, ids, self.finish)

    def result(self) -> Result:
        text = None if self.text is None else self.text.text
        return Result(self.prompt, self.ids, text, self.finish or "", self.error)


def checked_options(options: LoadOptions) -> RuntimeOptions:
    """Raises UsageError if there is an unknown or invalid one."""
    known = RuntimeOptions.__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"unknown options: {', '.join(unknown)}; known are {', '.join(known)}")
    return RuntimeOptions(**options)
