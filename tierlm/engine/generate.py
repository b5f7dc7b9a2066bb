"""Prefill, decode, and when to stop. Token ids in, token ids out; knows neither text nor tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tierlm.config import SamplingParams
from tierlm.engine.sampler import Sampler
from tierlm.errors import StorageError
from tierlm.memory.kvcache import KvCache, Span
from tierlm.models.decoder import Decoder, Segment


@dataclass(slots=True, eq=False)
class Running:
    """One sequence being generated. ``ids``: the new ones. ``finish``: None while it runs, then "stop", "length" or
    "error"; who reads the sequence may set it to "stop". ``limit``: new tokens, at most."""

    index: int
    prompt: Sequence[int]
    params: SamplingParams
    span: Span
    sampler: Sampler
    limit: int
    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    error: StorageError | None = None


class Engine:
    """Runs sequences on one decoder. ``eos``: ids that end a sequence; ``chunk``: tokens of a prefill step."""

    def __init__(self, decoder: Decoder, cache: KvCache, eos: Sequence[int], chunk: int):
        self.decoder, self.cache, self.eos, self.chunk = decoder, cache, frozenset(eos), chunk

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[Running]:
        """Yield a sequence each time it has a new id (a stop id too) or has failed.

        Prompts run side by side, as many as the cache holds at once, in order. A sequence whose reads fail ends with
        its ``error`` while the others go on; with one prompt its StorageError is raised.
        """
        waiting = list(enumerate(prompts))
        while waiting:
            self.cache.clear()
            wave: list[Running] = []
            while waiting:
                index, prompt = waiting[0]
                limit = min(params.max_new_tokens, self.cache.capacity - len(prompt) + 1)
                tokens = len(prompt) + limit - 1  # the last one is never fed back
                if tokens > self.cache.free:
                    break
                del waiting[0]
                wave.append(Running(index, prompt, params, self.cache.reserve(tokens), Sampler(params), limit))
            yield from self._run(wave, alone=len(prompts) == 1)

    def _run(self, wave: list[Running], alone: bool) -> Iterator[Running]:
        for sequence in wave:
            try:
                logits = self.prefill(sequence.prompt, sequence.span)
            except StorageError as error:
                yield self._failed(sequence, error, alone)
            else:
                yield self._take(sequence, logits)
        while running := [sequence for sequence in wave if sequence.finish is None]:
            try:
                outcomes: Sequence[Tensor | StorageError] = self._step(running)
            except StorageError as error:
                # One sequence's experts could not be read. Which one's? The others do not have to care.
                outcomes = [error] if len(running) == 1 else [self._alone(sequence) for sequence in running]
            for sequence, outcome in zip(running, outcomes, strict=True):
                if isinstance(outcome, StorageError):
                    yield self._failed(sequence, outcome, alone)
                else:
                    yield self._take(sequence, outcome)

    def prefill(self, prompt: Sequence[int], span: Span) -> Tensor:
        """Run a prompt, chunk by chunk; the logits of its last token, float32 [vocab]."""
        for start in range(0, len(prompt), self.chunk):
            logits = self.decoder.forward([Segment(prompt[start : start + self.chunk], span)], prefill=True)
        return logits[0]

    def _step(self, running: Sequence[Running]) -> Sequence[Tensor]:
        steps = [Segment(sequence.ids[-1:], sequence.span) for sequence in running]
        return list(self.decoder.forward(steps, prefill=False))

    def _alone(self, sequence: Running) -> Tensor | StorageError:
        try:
            return self._step([sequence])[0]
        except StorageError as error:
            return error

    def _take(self, sequence: Running, logits: Tensor) -> Running:
        params = sequence.params
        token = sequence.sampler.choose(logits, [*sequence.prompt, *sequence.ids])
        sequence.ids.append(token)
        if (token in self.eos and not params.ignore_eos) or token in params.stop_ids:
            sequence.finish = "stop"
        elif len(sequence.ids) >= sequence.limit:
            sequence.finish = "length"
        return sequence

    @staticmethod
    def _failed(sequence: Running, error: StorageError, alone: bool) -> Running:
        if alone:
            raise error
        sequence.finish, sequence.error = "error", error
        return sequence
