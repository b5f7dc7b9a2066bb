"""The public API of a loaded model: text in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tierlm import client
from tierlm.answer import Answer, Piece, Result, add, results, unfinished
from tierlm.checkpoints.hub import find_model
from tierlm.client import Box, Client, OnPrefill, Request
from tierlm.config import Budget, LoadOptions, RuntimeOptions, SamplingParams, format_size
from tierlm.engine.sequence import Keep, Pace, Progress
from tierlm.errors import BudgetError, CheckpointError, PromptError, StorageError, UsageError
from tierlm.live import Live, look
from tierlm.prompt import Prompt, Prompts, ids_of, several
from tierlm.runtime import Runtime
from tierlm.stats import Stats, collect
from tierlm.templates.template import Message
from tierlm.text import TextCodec, TextStream, default_params

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        budget: Budget | str | int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[LoadOptions],
    ) -> LLM:
        """Load a model: a folder in Hugging Face layout, a GGUF file, a Hub id or "demo". Nothing is converted.

        A Hub id may name a revision and a GGUF file: ``ORG/NAME@REVISION:Q4_K_M``. Weights that are not in the Hub's
        cache arrive while the model runs, those that it waits for first, and are kept for the next time.

        ``budget``: limits of the process; "8GiB" is ``Budget(ram="8GiB")``. ``options``: the fields of
        ``RuntimeOptions``. ``progress`` is called with the bytes loaded so far and in total.
        Raises UsageError, BudgetError, CheckpointError, StorageError.
        """
        limits, chosen = checked(budget, options)
        folder = find_model(model, whole=False)
        return cls(*client.load(folder, limits, chosen, progress), folder)

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_prefill: OnPrefill | None = None,
    ) -> list[Result]:
        """Generate for one or several prompts, text or ids. Results are in the order of the prompts.

        ``params``: for all prompts, or one for each. With ``n`` samples a prompt has n results, one after another.
        Prompts run concurrently if the context has room. One whose reads or arithmetic fail ends with finish_reason
        "error" and the others go on; if there is only one result, its StorageError or NumericsError is raised.
        ``on_prefill``: called here with the tokens of the prompts that have run and all, until they are equal. Raises
        PromptError, UsageError.
        """
        answers, request = self._generation(SimpleQueue[Progress](), prompts, params)
        request.on_prefill = on_prefill
        try:
            request.submit()
            while unfinished(answers):
                add(answers, request, request.next())
        finally:
            request.cancel()
        return results(answers)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        keep: Keep | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Iterator[Piece]:
        """Generate for one prompt and yield text as it arrives: whole characters, without stop texts.

        Texts are empty for a prompt of ids without a tokenizer. Closing the stream cancels the request. ``keep``: the
        tokens that the prompt begins with as another request of this ``keep`` did are not computed again.
        ``on_prefill`` and errors: as for ``generate``.
        """
        answer, request = self._stream(SimpleQueue[Progress](), prompt, params, keep)
        request.on_prefill = on_prefill
        try:
            request.submit()
            while answer.finish is None:
                if (piece := answer.piece(request.next())) is not None:
                    yield piece
        finally:
            request.cancel()

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Iterator[Piece]:
        """Stream the answer to a conversation, ``[{"role": "user", "content": "..."}, ...]``, with the checkpoint's
        chat template.

        ``tools``: JSON schemas of functions. ``template_args``: more variables of the template, such as
        ``enable_thinking``, ``documents`` or ``add_generation_prompt``. Raises UsageError if there is no template or it
        rejects the messages, CheckpointError if it is wrong or exceeds its limits. ``Conversation`` keeps the KV values
        from turn to turn.
        """
        yield from self.stream(self.codec.chat(messages, tools, template_args), params, on_prefill=on_prefill)

    def logits(self, ids: Prompt) -> Tensor:
        """Logits after every token of ``ids`` or of a text, float32 [T, vocab], for perplexity or a comparison.

        Raises PromptError, StorageError, NumericsError, and BudgetError if the result is larger than the plan allows:
        see ``logits_tokens`` of RuntimeOptions.
        """
        out, request = self._logits(SimpleQueue[Progress](), ids)
        try:
            request.submit()
            request.next()
        finally:
            request.cancel()
        return out

    def stats(self) -> Stats:
        """Counters since the model was loaded, until it was closed."""
        runtime = self._runtime
        return collect(runtime) if runtime is not None else self._stats  # type: ignore[return-value]

    def live(self) -> Live:
        """What is where at this moment: sequences, the KV cache, experts by tier. Cheap; does not disturb the engine.
        Raises UsageError once the model is closed."""
        return look(self._loaded())

    @property
    def bug(self) -> BaseException | None:
        """The error, a bug in tierlm, that has closed the model; None while there was none."""
        return self._client.worker.bug

    @property
    def context(self) -> int:
        """Tokens that fit the KV cache: those of all live requests, prompts and answers."""
        return self._loaded().context

    @property
    def vocab(self) -> int:
        """The number of the model's token ids."""
        return self._loaded().catalog.spec.vocab

    @property
    def eos(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self._loaded().scheduler.eos

    @cached_property
    def default_params(self) -> SamplingParams:
        """The sampling that the model's authors recommend in ``generation_config.json``; greedy if they do not.
        Nothing uses it unasked, except the command line. Raises CheckpointError."""
        return default_params(self._folder)

    @property
    def codec(self) -> TextCodec:
        """The tokenizer and chat template of the model. Raises CheckpointError if it has none."""
        if self._codec is None:
            self._codec = TextCodec(self._folder)
        return self._codec

    def close(self) -> None:
        """Stop transfers, free the memory, close the files, and write heat, trace and timeline. A step in another
        thread is abandoned; live requests then raise UsageError. May be called twice. No-op in a forked process.
        Raises StorageError if a write fails."""
        stats = None if self._runtime is None else self.stats()
        try:
            self._client.close()
        finally:
            if stats is not None:
                self._stats, self._runtime = stats, None  # its memory

    def __repr__(self) -> str:
        if (runtime := self._runtime) is None:
            return f"<LLM {self._folder}, closed>"
        layers, ram = len(runtime.catalog.spec.layers), format_size(runtime.ram_budget)
        return f"<LLM {self._folder}, {layers} layers on {runtime.device}, ram {ram}, context {runtime.context}>"

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

    def _loaded(self) -> Runtime:
        """Raises UsageError if the model is closed, or belongs to another process."""
        self._client.worker.check()
        if self._runtime is None:
            raise UsageError("this model is closed")
        return self._runtime

    def _generation(
        self,
        mailbox: Box,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> tuple[list[Answer], Request[Box]]:
        """The answers of ``generate``, still empty, and the request that fills them."""
        samples = [(prompt, one) for prompt, each in paired(several(prompts), params) for one in each.samples()]
        answers = [Answer(*self._prepare(prompt, one)) for prompt, one in samples]  # check all before any is queued
        pace = Pace.EACH if any(one.stop for _, one in samples) else Pace.END
        queued = [(answer.prompt, one) for answer, (_, one) in zip(answers, samples, strict=True)]
        keep = Keep() if any(a.prompt == b.prompt for a, b in pairwise(answers)) else None  # samples share a prompt
        return answers, Request(self._client, mailbox, queued, pace, keep=keep)

    def _stream(
        self,
        mailbox: Box,
        prompt: Prompt,
        params: SamplingParams | None,
        keep: Keep | None = None,
        pace: Pace = Pace.ASKED,
    ) -> tuple[Answer, Request[Box]]:
        """The answer of ``stream``, still empty, and the request that fills it."""
        ((_, params),) = paired([prompt], params)
        if params.n > 1:
            raise UsageError(f"n: a stream has one sample, found {params.n}; use generate, or several streams")
        answer = Answer(*self._prepare(prompt, params))
        queued = [(answer.prompt, params)]
        return answer, Request(self._client, mailbox, queued, pace, keep=keep)

    def _logits(self, mailbox: Box, prompt: Prompt) -> tuple[Tensor, Request[Box]]:
        """The result of ``logits``, still empty, and the request that fills it."""
        ids, runtime = self.ids(prompt), self._loaded()
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
        out = torch.empty(len(ids), runtime.catalog.spec.vocab)
        return out, Request(self._client, mailbox, [(ids, SamplingParams())], Pace.END, out)

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked against vocabulary and context. Raises PromptError."""
        runtime = self._loaded()
        spec, context = runtime.catalog.spec, runtime.context
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else ids_of(prompt)
        if not ids:
            raise PromptError("a prompt needs at least one token")
        if wrong := [token for token in ids if not 0 <= token < spec.vocab]:
            raise PromptError(f"token id {wrong[0]} is not in the vocabulary of {spec.vocab}")
        if len(ids) > context:
            most = spec.max_position
            more = f"; context={len(ids)} reserves enough" if len(ids) <= most else ""
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the context {context}, of at most the model's own {most}{more}"
            )
        return ids

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], TextStream | None]:
        """The ids to run, and the stream that decodes the new ones; None without a tokenizer."""
        ids, vocab = self.ids(prompt), self._loaded().catalog.spec.vocab
        if wrong := [token for token in params.logit_bias if token >= vocab]:
            raise UsageError(f"logit_bias: token id {wrong[0]} is not in the vocabulary of {vocab}")
        try:
            return ids, TextStream(self.codec, tuple(params.stop), special=not params.skip_special_tokens)
        except CheckpointError:
            if isinstance(prompt, str) or params.stop:
                raise
            return ids, None  # ids in, ids out


def paired(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters."""
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params or SamplingParams()) for prompt in prompts]
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise UsageError(f"params: expected SamplingParams, or one for each prompt, found {params!r}")
    if len(params) != len(prompts):
        raise UsageError(f"params: expected one for each of {len(prompts)} prompts, found {len(params)}")
    return list(zip(prompts, params, strict=True))


def checked(budget: Budget | str | int | None, options: LoadOptions) -> tuple[Budget, RuntimeOptions]:
    """The settings of a load. Raises UsageError if one is unknown or invalid."""
    known = RuntimeOptions.__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"unknown options: {', '.join(unknown)}; known are {', '.join(known)}")
    limits = budget if isinstance(budget, Budget) else Budget() if budget is None else Budget(budget)
    return limits, RuntimeOptions(**options)
