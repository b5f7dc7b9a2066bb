"""Text in, text out: the public face of a loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from tierlm.checkpoints.hub import find_model
from tierlm.config import Budget, LoadOptions, RuntimeOptions, SamplingParams
from tierlm.engine.generate import Running
from tierlm.errors import CheckpointError, PromptError, StorageError, UsageError
from tierlm.runtime import Runtime
from tierlm.stats import Counters, Stats, collect
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
    """A loaded model. Made by ``LLM.load``; a context manager. Not for use from several threads at once."""

    def __init__(self, runtime: Runtime, folder: Path):
        self._runtime, self._folder = runtime, folder
        self._counters = Counters()
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
        return cls(Runtime(folder, budget or Budget(), chosen, progress), folder)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Result]:
        """Generate for one prompt or several, text or ids; the results in the order of the prompts.

        Prompts run side by side as far as the context allows. One whose reads fail ends with finish_reason "error"
        while the others go on; if it is the only one, its StorageError is raised. Raises PromptError.
        """
        params = params or SamplingParams()
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several: Sequence[Prompt] = [prompts] if one else prompts  # type: ignore[list-item, assignment]
        ids = [self._ids(prompt) for prompt in several]
        streams = [self._text_stream(prompt, params) for prompt in several]
        ended = {sequence.index: sequence for sequence, _ in self._run(ids, streams, params)}
        return [
            Result(prompt, ended[i].ids, stream.text if stream else None, ended[i].finish or "", ended[i].error)
            for i, (prompt, stream) in enumerate(zip(ids, streams, strict=True))
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Generate for one prompt, yielding text as it comes: whole characters, and nothing of a stop text.

        For a prompt of ids and a model without tokenizer the texts are empty. Raises as ``generate``.
        """
        params = params or SamplingParams()
        ids, stream = self._ids(prompt), self._text_stream(prompt, params)
        pending: list[int] = []
        for sequence, text in self._run([ids], [stream], params):
            pending.append(sequence.ids[-1])
            if text or sequence.finish or stream is None:
                yield Piece(text, pending, sequence.finish)
                pending = []

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Stream the answer to a conversation, ``[{"role": "user", "content": "..."}, ...]``, through the checkpoint's
        own chat template. Raises UsageError if it has none."""
        codec = self.codec
        ids = codec.encode(codec.chat(messages), special=False)
        yield from self.stream(ids, params)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token of ``ids``, float32 [T, vocab]: for perplexity, or comparison with a reference."""
        self._open()
        return self._runtime.logits(self._ids(ids))

    def stats(self) -> Stats:
        """What has happened since the model was loaded."""
        return collect(self._runtime, self._counters)

    @property
    def codec(self) -> TextCodec:
        """The tokenizer and chat template of the model. Raises CheckpointError if it has none."""
        if self._codec is None:
            self._codec = TextCodec(self._folder)
        return self._codec

    def close(self) -> None:
        """Stop all transfers, free the memory, close the files. May be called twice."""
        if not self._closed:
            self._closed = True
            self._runtime.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        if self._closed:
            raise UsageError("this model is closed")

    def _ids(self, prompt: Prompt) -> list[int]:
        """A prompt as ids, checked against the vocabulary and the context."""
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

    def _text_stream(self, prompt: Prompt, params: SamplingParams) -> TextStream | None:
        try:
            return TextStream(self.codec, tuple(params.stop))
        except CheckpointError:
            if isinstance(prompt, str) or params.stop:
                raise
            return None  # ids in, ids out

    def _run(
        self, ids: Sequence[list[int]], streams: Sequence[TextStream | None], params: SamplingParams
    ) -> Iterator[tuple[Running, str]]:
        """Each new token's sequence, and the text that it makes certain. Counts time in the engine only."""
        self._open()
        counters, runtime = self._counters, self._runtime
        events = runtime.engine.generate(ids, params)
        asked = mark = time.perf_counter()
        meter, first = runtime.meter(), True
        for sequence in events:
            now, spent = time.perf_counter(), runtime.meter()
            if len(sequence.ids) > 1:
                counters.decode.add(1, now - mark, spent - meter)
            else:
                counters.prefill.add(len(sequence.prompt), now - mark, spent - meter)
                counters.requests += 1
            if first:
                counters.first_token, first = now - asked, False
            yield sequence, self._text(sequence, streams[sequence.index], params)
            runtime.follow_pressure()
            mark, meter = time.perf_counter(), runtime.meter()

    def _text(self, sequence: Running, stream: TextStream | None, params: SamplingParams) -> str:
        if stream is None:
            return ""
        ended = sequence.finish == "stop" or sequence.error is not None
        text = "" if ended else stream.push(sequence.ids[-1])  # a stop id is not text
        if stream.stopped:
            sequence.finish = "stop"
        return text + stream.flush() if sequence.finish else text
