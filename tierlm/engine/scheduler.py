"""Decides which sequences run in each step. All computation goes through it: generation, chat and logits."""

from __future__ import annotations

import threading
import time
from collections import abc, deque

import torch
from torch import Tensor

from tierlm.config import SamplingParams
from tierlm.engine.counters import Counters
from tierlm.engine.sequence import Progress, Sequence, State
from tierlm.errors import StorageError, UsageError
from tierlm.memory.kvcache import KvCache
from tierlm.memory.meter import Meter
from tierlm.memory.pressure import PressureRelief
from tierlm.models.decoder import Decoder, Segment


class Scheduler:
    """Runs sequences on one decoder, step by step. Thread-safe.

    It has no thread: a caller that waits for a token takes the lock and runs a step for all sequences that need one;
    the other callers find their tokens when they get the lock. A sequence with an unread token pauses, so a stream is
    at most one token ahead of its reader. If all running sequences pause while a request waits for room, they all run.

    ``eos``: ids that end a sequence. ``chunk``: tokens of a prefill step, shared by the prompts in it. ``threads``: of
    torch and the kernels; None: torch's own choice.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        meter: Meter,
        relief: PressureRelief | None,
        eos: abc.Iterable[int],
        chunk: int,
        threads: int | None = None,
    ):
        self.decoder, self.cache, self.meter, self.relief = decoder, cache, meter, relief
        self.eos, self.chunk, self.threads = frozenset(eos), chunk, threads
        self.counters = Counters()
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def submit(self, prompt: abc.Sequence[int], params: SamplingParams) -> Sequence:
        """Queue a prompt that fits the context. It runs during calls of ``advance``."""
        limit = min(params.max_new_tokens, self.cache.capacity - len(prompt) + 1)
        return self._queue(Sequence(prompt, params, len(prompt) + limit - 1, limit))  # the last token is never fed back

    def advance(self, sequences: abc.Sequence[Sequence]) -> list[Progress]:
        """Run steps until one of ``sequences`` has a new token or has ended. Returns the progress of each.

        Raises UsageError once the scheduler is closed.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise UsageError("this model is closed")
                if any(sequence.unread or sequence.ended for sequence in sequences):
                    return [sequence.take() for sequence in sequences]
                self._step()

    def logits(self, ids: abc.Sequence[int]) -> Tensor:
        """Logits after every token of ``ids``, float32 [T, vocab]. Raises StorageError, UsageError."""
        out = torch.empty(len(ids), self.decoder.spec.vocab)
        sequence = self._queue(Sequence(ids, SamplingParams(), len(ids), 0, out))
        try:
            (progress,) = self.advance([sequence])
        finally:
            sequence.cancel()
        if progress.error is not None:
            raise progress.error
        return out

    def close(self) -> None:
        """Wait for the current step, if any; run no more."""
        with self._lock:
            self._closed = True

    def _queue(self, sequence: Sequence) -> Sequence:
        self._waiting.append(sequence)  # atomic
        return sequence

    def _step(self) -> None:
        for sequence in [sequence for sequence in self._running if sequence.cancelled]:
            self._end(sequence, sequence.finish)
        self._admit()
        if self.relief is not None:
            self.relief.follow()
        prefilling = [sequence for sequence in self._running if sequence.state is State.PREFILL]
        if prefilling:
            self._prefill(prefilling)
        else:
            wanted = [sequence for sequence in self._running if not sequence.unread]
            self._decode(wanted or list(self._running))

    def _admit(self) -> None:
        """Reserve KV cache for waiting sequences, in order; drop cancelled ones."""
        while self._waiting:
            sequence = self._waiting[0]
            if sequence.cancelled:
                sequence.state = State.ENDED
            elif self.cache.can_reserve(sequence.capacity):
                sequence.span, sequence.state = self.cache.reserve(sequence.capacity), State.PREFILL
                self._running.append(sequence)
            else:
                return
            self._waiting.popleft()

    def _prefill(self, sequences: list[Sequence]) -> None:
        """One prefill step. It takes a whole chunk of a prompt, the rest, or nothing, so the cuts in a prompt do not
        depend on the other sequences."""
        batch: list[Sequence] = []
        segments: list[Segment] = []
        room = self.chunk
        if sequences[0].logits is not None:
            sequences = sequences[:1]
        for sequence in sequences:
            ids = sequence.prompt[sequence.done : sequence.done + self.chunk]
            if len(ids) <= room and (sequence.logits is None or not batch):
                assert sequence.span is not None
                batch.append(sequence)
                segments.append(Segment(ids, sequence.span))
                room -= len(ids)
        self._run(batch, segments, prefill=True)

    def _decode(self, batch: list[Sequence]) -> None:
        segments = [Segment(sequence.ids[-1:], sequence.span) for sequence in batch if sequence.span is not None]
        self._run(batch, segments, prefill=False)

    def _run(self, batch: list[Sequence], segments: list[Segment], prefill: bool) -> None:
        """Run one step of ``batch``. A sequence whose reads fail ends with its error; the others go on."""
        if not batch:
            return
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # at each step, since torch has a number for each calling thread
        phase = self.counters.prefill if prefill else self.counters.decode
        began, before = time.perf_counter(), self.meter.read()
        for sequence, segment, outcome in zip(batch, segments, self._forward(batch, segments, prefill), strict=True):
            if isinstance(outcome, StorageError):
                sequence.error = outcome
                self._end(sequence, "error")
                continue
            phase.tokens += len(segment.ids)
            if prefill:
                sequence.done += len(segment.ids)
            if not prefill or sequence.done == len(sequence.prompt):
                self._take(sequence, outcome)
        phase.add(0, time.perf_counter() - began, self.meter.read() - before)

    def _forward(
        self, batch: list[Sequence], segments: list[Segment], prefill: bool
    ) -> abc.Sequence[Tensor | StorageError]:
        """Per segment: the logits of its last token, float32 [vocab], or the error."""
        logits = batch[0].logits
        out = None if logits is None else logits[batch[0].done :][: len(segments[0].ids)]
        try:
            found = self.decoder.forward(segments, prefill=prefill, out=out)
            return [found[-1]] if out is not None else list(found)
        except StorageError as error:
            if len(batch) == 1:
                return [error]
        # Retried alone, so that one sequence's failure does not fail the batch.
        return [
            self._forward([sequence], [segment], prefill)[0] for sequence, segment in zip(batch, segments, strict=True)
        ]

    def _take(self, sequence: Sequence, logits: Tensor) -> None:
        """Sample the next token and end the sequence if it is the last."""
        if sequence.logits is not None:
            self._end(sequence, "length")
            return
        params = sequence.params
        token = sequence.sampler.choose(logits, sequence.prompt, sequence.ids)
        if not sequence.ids:
            self.counters.first_tokens += 1
            self.counters.first_token = time.perf_counter() - sequence.submitted
        sequence.ids.append(token)
        sequence.state = State.DECODE
        if (token in self.eos and not params.ignore_eos) or token in params.stop_ids:
            self._end(sequence, "stop")
        elif len(sequence.ids) >= sequence.limit:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, finish: str | None) -> None:
        assert sequence.span is not None
        self.cache.release(sequence.span)
        self._running.remove(sequence)
        sequence.span, sequence.finish, sequence.state = None, finish, State.ENDED
