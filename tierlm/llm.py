"""Text in, text out: the public face of a loaded model."""

from __future__ import annotations

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
    """Text that has come, and the ids behind it; ``finish_reason`` is set on the last piece."""

    text: str
    ids: list[int]
    finish_reason: str | None = None


@dataclass(frozen=True)
class Result:
    """One prompt's outcome. ``ids``: what was generated, a stop id included; ``text``: None if there is no tokenizer.

    ``finish_reason``: "stop" (a stop id or text), "length", or "error", and then ``error`` is set.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    finish_reason: str
    error: StorageError | None = None


class LLM:
    """A loaded model. Made by ``LLM.load``; a context manager.

    Many requests may be alive at once, from one thread or several: each gets the tokens that it gets alone.
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
        """Load a model: a folder in Hugging Face layout, a hub id, or "demo". Nothing is converted or written.

        ``budget``: what the process may use. ``options``: the fields of ``RuntimeOptions``. ``progress`` is called with
        the bytes loaded so far, and in total. Raises UsageError, BudgetError, CheckpointError, StorageError.
        """
        known = RuntimeOptions.__dataclass_fields__
        if unknown := sorted(set(options) - set(known)):
            raise UsageError(f"unknown options: {', '.join(unknown)}; known are {', '.join(known)}")
        chosen = RuntimeOptions(**options)
        folder = find_model(model)
        return cls(load_runtime(folder, budget or Budget(), chosen, progress), folder)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Result]:
        """Generate for one prompt or several, text or ids; the results in the order of the prompts.

        Prompts run side by side as far as the context allows. One whose reads fail ends with finish_reason "error"
        while the others go on; if it is the only one, its StorageError is raised. Raises PromptError.
        """
        params = params or SamplingParams()
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several: Sequence[Prompt] = [prompts] if one else prompts  # type: ignore[list-item, assignment]
        prepared = [self._prepare(prompt, params) for prompt in several]  # all are checked before one is queued
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
        """Generate for one prompt, yielding text as it comes: whole characters, and nothing of a stop text.

        For a prompt of ids and a model without tokenizer the texts are empty. Raises as ``generate``.
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
        """Stream the answer to a conversation, ``[{"role": "user", "content": "..."}, ...]``, through the checkpoint's
        own chat template. Raises UsageError if it has none."""
        codec = self.codec
        ids = codec.encode(codec.chat(messages), special=False)
        yield from self.stream(ids, params)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token of ``ids``, float32 [T, vocab]: for perplexity, or comparison with a reference.

        Raises PromptError, StorageError, and BudgetError for too large a result.
        """
        ids, runtime = self._ids(ids), self._runtime
        per_token, room = runtime.catalog.spec.vocab * 4, runtime.logits_room
        if len(ids) * per_token > room:
            raise BudgetError(
                f"the logits of {len(ids)} tokens take {format_size(len(ids) * per_token)}, of the ram budget "
                f"{format_size(room)} are left: ask for at most {room // per_token} tokens at a time",
                floor=runtime.ram_budget - room + len(ids) * per_token,
                given=runtime.ram_budget,
                dominant="logits",
            )
        return runtime.scheduler.logits(ids)

    def stats(self) -> Stats:
        """What has happened since the model was loaded."""
        return collect(self._runtime)

    @property
    def codec(self) -> TextCodec:
        """The tokenizer and chat template of the model. Raises CheckpointError if it has none."""
        if self._codec is None:
            self._codec = TextCodec(self._folder)
        return self._codec

    def close(self) -> None:
        """Stop all transfers, free the memory, close the files. May be called twice. A step that runs in another thread
        is waited for; requests that are alive then raise UsageError."""
        if not self._closed:
            self._closed = True
            self._runtime.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ids(self, prompt: Prompt) -> list[int]:
        """A prompt as ids, checked against the vocabulary and the context."""
        if self._closed:
            raise UsageError("this model is closed")
        spec, context = self._runtime.catalog.spec, self._runtime.context
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise PromptError("a prompt needs at least one token")
        if wrong := [token for token in ids if not 0 <= token < spec.vocab]:
            raise PromptError(f"token id {wrong[0]} is not in the vocabulary of {spec.vocab}")
        if len(ids) > context:
            hint = f"; context={len(ids)} or more reserves more" if len(ids) <= spec.max_position else ""
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the context {context} (the model's own: {spec.max_position}){hint}"
            )
        return ids

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], TextStream | None]:
        """Ids to run, and what makes text of those that come; None where there is no tokenizer."""
        ids = self._ids(prompt)
        try:
            return ids, TextStream(self.codec, tuple(params.stop))
        except CheckpointError:
            if isinstance(prompt, str) or params.stop:
                raise
            return ids, None  # ids in, ids out


class _Request:
    """A sequence, and the text that its tokens make. ``ids``: the new ones, up to where the text ends."""

    def __init__(self, sequence: TokenSequence, text: TextStream | None):
        self.sequence, self.text = sequence, text
        self.ids: list[int] = []
        self.finish: str | None = None
        self.error: StorageError | None = None

    def add(self, new: Progress) -> str:
        """Take up new tokens; the text that they make certain."""
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
