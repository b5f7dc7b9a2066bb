"""The public API of a loaded model: text in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from tierlm.checkpoints.hub import find_model
from tierlm.config import Budget, LoadOptions, RuntimeOptions, SamplingParams, format_size
from tierlm.engine.sequence import Progress
from tierlm.engine.sequence import Sequence as TokenSequence
from tierlm.errors import BudgetError, CheckpointError, PromptError, StorageError, UsageError
from tierlm.loading import load_runtime
from tierlm.runtime import Runtime
from tierlm.stats import Stats, collect
from tierlm.text import Message, TextCodec, TextStream

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
    error: StorageError | None = None


class LLM:
    """A loaded model and context manager, made by ``LLM.load``.

    Requests may run concurrently, from one thread or several; each gets the tokens it gets alone, but for ties within
    rounding (docs/how-it-works.md).
    """

    def __init__(self, runtime: Runtime, folder: Path):
        self._runtime, self._folder = runtime, folder
        self._codec: TextCodec | None = None
        self._closed = False

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
        known = RuntimeOptions.__dataclass_fields__
        if unknown := sorted(set(options) - set(known)):
            raise UsageError(f"unknown options: {', '.join(unknown)}; known are {', '.join(known)}")
        chosen = RuntimeOptions(**options)
        folder = find_model(model)
        return cls(load_runtime(folder, budget or Budget(), chosen, progress), folder)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Result]:
        """Generate for one or several prompts, text or ids. Results are in the order of the prompts.

        Prompts run concurrently if the context has room. A prompt whose reads fail ends with finish_reason "error" and
        the others go on; a single prompt raises its StorageError. Raises PromptError.
        """
        params = params or SamplingParams()
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several: Sequence[Prompt] = [prompts] if one else prompts  # type: ignore[list-item, assignment]
        prepared = [self._prepare(prompt, params) for prompt in several]  # check all before any is queued
        scheduler = self._runtime.scheduler
        requests = [_Request(scheduler.submit(ids, params), text) for ids, text in prepared]
        try:
            while alive := [request for request in requests if request.finish is None]:
                progress = scheduler.advance([request.sequence for request in alive])
                for request, new in zip(alive, progress, strict=True):
                    request.add(new)
        finally:
            for request in requests:
                request.sequence.cancel()
        if len(requests) == 1 and requests[0].error is not None:
            raise requests[0].error
        return [request.result() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Generate for one prompt and yield text as it arrives: whole characters, without stop texts.

        Texts are empty for a prompt of ids without a tokenizer. Raises as ``generate``.
        """
        params, scheduler = params or SamplingParams(), self._runtime.scheduler
        ids, text_stream = self._prepare(prompt, params)
        request, shown = _Request(scheduler.submit(ids, params), text_stream), 0
        try:
            while request.finish is None:
                text = request.add(*scheduler.advance([request.sequence]))
                if request.error is not None:
                    raise request.error
                if text or request.finish or request.text is None:
                    yield Piece(text, request.ids[shown:], request.finish)
                    shown = len(request.ids)
        finally:
            request.sequence.cancel()

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Stream the answer to a conversation, ``[{"role": "user", "content": "..."}, ...]``, with the checkpoint's
        chat template. Raises UsageError if it has none."""
        yield from self.stream(self.codec.encode(self.codec.chat(messages), special=False), params)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token of ``ids``, float32 [T, vocab], for perplexity or comparison with a reference.

        Raises PromptError, StorageError, and BudgetError if the result is larger than the plan allows: see
        ``logits_tokens`` of RuntimeOptions.
        """
        ids, runtime = self._ids(ids), self._runtime
        per_token, room = runtime.catalog.spec.vocab * 4, runtime.logits_room
        needed, ram = len(ids) * per_token, runtime.plan.ram
        if needed > room:
            floor = ram.floor - ram.parts["logits"] + needed
            raise BudgetError(
                f"the logits of {len(ids)} tokens take {format_size(needed)}, but the plan has {format_size(room)} for "
                f"them: load the model with logits_tokens={len(ids)}, whose least ram budget is {format_size(floor)}, "
                f"or ask for at most {room // per_token} tokens at a time",
                floor=floor,
                given=runtime.ram_budget,
                dominant="logits",
            )
        return runtime.scheduler.logits(ids)

    def stats(self) -> Stats:
        """Counters since the model was loaded."""
        return collect(self._runtime)

    @property
    def codec(self) -> TextCodec:
        """The tokenizer and chat template of the model. Raises CheckpointError if it has none."""
        if self._codec is None:
            self._codec = TextCodec(self._folder)
        return self._codec

    def close(self) -> None:
        """Stop transfers, free the memory, close the files, and write heat, trace and timeline. Waits for a step in
        another thread; live requests then raise UsageError. May be called twice. Raises StorageError if a write fails.
        """
        if not self._closed:
            self._closed = True
            self._runtime.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StorageError as unwritten:
            if error is None:
                raise
            warnings.warn(str(unwritten), stacklevel=2)  # not to hide the error

    def _ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked against vocabulary and context."""
        if self._closed:
            raise UsageError("this model is closed")
        spec, context = self._runtime.catalog.spec, self._runtime.context
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


class _Request:
    """A sequence and its text. ``ids``: the new tokens, up to the end of the text."""

    def __init__(self, sequence: TokenSequence, text: TextStream | None):
        self.sequence, self.text = sequence, text
        self.ids: list[int] = []
        self.finish: str | None = None
        self.error: StorageError | None = None

    def add(self, new: Progress) -> str:
        """Add new tokens. Returns the text that is now final."""
        self.error, found = new.error, ""
        for at, token in enumerate(new.ids, 1):
            self.ids.append(token)
            if self.text is not None and not (new.finish == "stop" and at == len(new.ids)):  # a stop id is not text
                found += self.text.push(token)
                if self.text.stopped:
                    self.finish = "stop"
                    self.sequence.cancel()
                    return found + self.text.flush()
        self.finish = new.finish
        return found + self.text.flush() if self.text is not None and self.finish else found

    def result(self) -> Result:
        text = None if self.text is None else self.text.text
        return Result(list(self.sequence.prompt), self.ids, text, self.finish or "", self.error)
