"""Decides which sequences run in each step. All computation goes through it: generation, chat and logits."""

from __future__ import annotations

import bisect
import functools
import itertools
import time
from collections import abc

import torch
from torch import Tensor

from tierlm.engine.counters import Counters
from tierlm.engine.prefixes import Prefixes
from tierlm.engine.sampler import logprob_of
from tierlm.engine.sequence import Keep, Sequence, State
from tierlm.engine.speculation.speculation import Speculation
from tierlm.engine.stored import StoredPrefixes
from tierlm.errors import NumericsError, StorageError, TierlmError
from tierlm.memory.kvcache import KvCache
from tierlm.memory.kvdisk import KvDisk, KvTier
from tierlm.memory.meter import Meter, Usage
from tierlm.memory.pressure import PressureRelief
from tierlm.models.decoder import Decoder, Segment

ROOM = 64  # tokens of an answer that are reserved at a time
Watch = abc.Callable[[abc.Sequence[Sequence]], None]


class Scheduler:
    """Runs sequences on one decoder, step by step. Used from the engine thread only.

    A step runs while a client waits for a token, and serves all sequences that do not pause. A sequence pauses while
    its client has yet to take a token, so a stream is at most one token ahead of its reader. If all running sequences
    pause while a request waits for room, they all run.

    A step computes prompts, or one token of each answer, and drafts of the next ones with ``speculation``. A stream is
    then at most one step ahead of its reader. Prompts and the answers of other requests each get half of the time: the
    seconds of a prefill step are owed to the answers that it holds up, and the next prefill step runs when they are
    paid back.

    A sequence with ``keep`` leaves its KV values in the cache when it ends, and goes on from those of others: Prefixes.
    With ``disk`` they go there too, and are read while other sequences run: StoredPrefixes.

    Room in the KV cache is reserved for a prompt and ROOM tokens, and then as an answer grows. A sequence is admitted
    if those that run can grow by as much. If an answer finds no room, the sequence of the last rank is preempted: it
    waits again, and goes on from what is left of its KV values. So is every sequence of a later rank if one that waits
    fits only then. The first of all always runs.

    ``eos``: ids that end a sequence. ``chunk``: tokens of a prefill step, shared by the prompts in it.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        meter: Meter,
        relief: PressureRelief | None,
        eos: abc.Iterable[int],
        chunk: int,
        disk: KvDisk | None = None,
        speculation: Speculation | None = None,
    ):
        self.decoder, self.cache, self.meter, self.relief = decoder, cache, meter, relief
        self.eos, self.chunk, self.speculation = frozenset(eos), chunk, speculation
        self.counters = Counters()
        self._waiting: list[Sequence] = []  # both by rank
        self._running: list[Sequence] = []
        self._prefixes = Prefixes(cache)
        self._stored = StoredPrefixes(cache, disk, self.counters.prefill)
        self._owed = 0.0  # seconds, to answers

    @property
    def wanted(self) -> bool:
        """Whether there is a step to run."""
        return any(sequence.wanted for sequence in itertools.chain(self._waiting, self._running))

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that run, and that wait. Any thread may read it."""
        return len(self._running), len(self._waiting)

    def kv_tiers(self) -> dict[str, KvTier]:
        """KV values held and found, by tier. Any thread may read them."""
        return {"ram": self._prefixes.snapshot(), **self._stored.tiers()}

    def submit(self, sequences: abc.Iterable[Sequence]) -> None:
        """Queue sequences whose prompts fit the context."""
        for sequence in sequences:
            if sequence.logits is None:
                sequence.limit = min(sequence.params.max_new_tokens, self.cache.capacity - len(sequence.prompt) + 1)
            bisect.insort(self._waiting, sequence, key=_rank)

    def ask(self, sequences: abc.Iterable[Sequence]) -> None:
        """The client waits for the next token of ``sequences``."""
        for sequence in sequences:
            sequence.asked = sequence.mailbox.empty() and not sequence.ended  # or a token crossed the request

    def cancel(self, sequences: abc.Iterable[Sequence]) -> None:
        """Drop ``sequences``, whose client is gone."""
        for sequence in sequences:
            if sequence.span is not None:
                self._end(sequence, None)
            elif sequence in self._waiting:
                self._waiting.remove(sequence)
            sequence.state, sequence.request = State.ENDED, None

    def close(self) -> None:
        """End all sequences and tell their clients."""
        for sequence in [*self._waiting, *self._running]:
            sequence.finish, sequence.state, sequence.request = "error", State.ENDED, None
            sequence.tell()
        self._waiting.clear()
        self._running.clear()

    def step(self, watch: Watch) -> None:
        """Run one step. ``watch``: called with its sequences before each layer; it may raise to abandon the step, which
        leaves them as they were."""
        self._admit()
        self._begin(self._stored.arrived())
        if self.relief is not None:
            self.relief.follow()
        ready = [sequence for sequence in self._running if not sequence.paused] or self._running
        prompts = [sequence for sequence in ready if sequence.state is State.PREFILL]
        answers = [sequence for sequence in ready if sequence.state is State.DECODE]
        requests = {sequence.mailbox for sequence in prompts}
        held_up = any(sequence.mailbox not in requests for sequence in answers)
        began = time.perf_counter()
        if prompts and not (held_up and self._owed > 0):
            self._prefill(prompts, watch)
            self._owed = time.perf_counter() - began if held_up else 0.0
        elif not answers and any(sequence.state is State.LOADING for sequence in self._running):
            self._stored.wait()
        else:
            self._decode(self._grown(answers), watch)
            self._owed = max(0.0, self._owed - (time.perf_counter() - began))
        self._stored.store(self._running)

    def _admit(self) -> None:
        """Reserve KV cache for waiting sequences, in order.

        A sequence waits while a running one computes a chunk or more of its prompt, or the rest of it, instead of
        computing that too.
        """
        while self._waiting:
            sequence = self._waiting[0]
            coming, left = self._prefixes.coming(sequence, (one for one in self._running if not one.paused))
            if coming >= self.chunk or (coming > 0 and not left):
                return
            sequence.capacity = min(sequence.most, len(sequence.tokens) + ROOM)
            if not self._make_room(sequence) or (span := self._prefixes.reserve(sequence, self._running)) is None:
                return
            self._waiting.remove(sequence)
            sequence.span = span
            bisect.insort(self._running, sequence, key=_rank)
            if self._stored.begin(sequence):
                sequence.state = State.LOADING
            else:
                self._begin([sequence])

    def _begin(self, sequences: abc.Iterable[Sequence]) -> None:
        """Go on to compute prompts from the values that are there."""
        for sequence in sequences:
            assert sequence.span is not None
            sequence.state, sequence.done = State.PREFILL, sequence.span.length
            if not sequence.prefilled:  # later, they are its own
                sequence.cached = sequence.prefilled = sequence.span.length

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether ``sequence`` fits beside the running ones, after preempting those of later ranks if that helps."""
        first = bisect.bisect(self._running, sequence.rank, key=_rank)
        later = [other.span for other in self._running[first:] if other.span is not None]
        if not self._prefixes.fits(sequence.capacity + _growth(self._running[:first]), *later):
            return False
        while not self._prefixes.fits(sequence.capacity + _growth(self._running)):
            self._preempt(self._running[-1])
        return True

    def _grown(self, answers: abc.Sequence[Sequence]) -> list[Sequence]:
        """Those of ``answers`` that have room for one more token, which is all but the preempted."""
        for sequence in answers:
            while (span := sequence.span) is not None and span.length == span.capacity:
                if not self._prefixes.grow(span, min(ROOM, sequence.most - span.capacity)):
                    self._preempt(self._running[-1])
        return [sequence for sequence in answers if sequence.span is not None]

    def _preempt(self, sequence: Sequence) -> None:
        """Let ``sequence`` wait for room again. Its KV values are kept for it."""
        sequence.keep = sequence.keep or Keep(stored=False)
        self._stored.end(sequence)
        self._prefixes.keep(sequence)
        self._running.remove(sequence)
        sequence.span, sequence.state = None, State.WAITING
        bisect.insort(self._waiting, sequence, key=_rank)
        self.counters.preempted += 1

    def _prefill(self, sequences: list[Sequence], watch: Watch) -> None:
        """One prefill step. It takes a whole chunk of a prompt, the rest, or nothing, so the cuts in a prompt do not
        depend on the other sequences."""
        batch: list[Sequence] = []
        segments: list[Segment] = []
        start = self._start()
        room = self.chunk
        if sequences[0].logits is not None:
            sequences = sequences[:1]
        for sequence in sequences:
            ids = sequence.tokens[sequence.done : sequence.done + self.chunk]
            if len(ids) <= room and (sequence.logits is None or not batch):
                assert sequence.span is not None
                batch.append(sequence)
                segments.append(Segment(ids, sequence.span))
                room -= len(ids)
        self._run(batch, segments, watch, start, prefill=True)

    def _decode(self, batch: list[Sequence], watch: Watch) -> None:
        if not batch:
            return
        start, speculation = self._start(), self.speculation
        proposals = [] if speculation is None else speculation.propose(batch)
        drafts = [proposal.verified for proposal in proposals] or [[]] * len(batch)
        segments = [
            Segment([sequence.ids[-1], *more], sequence.span)
            for sequence, more in zip(batch, drafts, strict=True)
            if sequence.span is not None
        ]
        self._run(batch, segments, watch, start, prefill=False)
        if speculation is not None:
            speculation.learn(batch, proposals, time.perf_counter() - start[0])

    def _start(self) -> tuple[float, Usage]:
        """The time and the meter when a step begins."""
        return time.perf_counter(), self.meter.read()

    def _run(
        self, batch: list[Sequence], segments: list[Segment], watch: Watch, start: tuple[float, Usage], prefill: bool
    ) -> None:
        """Run one step of ``batch``. A sequence that fails ends with its error; the others go on."""
        if not batch:
            return
        phase = self.counters.prefill if prefill else self.counters.decode
        rows = [len(segment.ids) for segment in segments]
        width = 0 if self.speculation is None else self.speculation.width
        states = torch.empty(sum(rows), width)
        outcomes = self._forward(batch, segments, watch, prefill, states)
        try:
            for sequence, segment, outcome, seen in zip(
                batch, segments, outcomes, states.split_with_sizes(rows), strict=True
            ):
                if isinstance(outcome, TierlmError):
                    sequence.error = outcome
                    self._end(sequence, "error")
                    continue
                if not prefill:
                    taken = self._verify(sequence, segment.ids[1 : len(outcome)], outcome)
                    phase.tokens += taken
                    self._observe(sequence, seen[:taken])
                    continue
                phase.tokens += len(segment.ids)
                sequence.done += len(segment.ids)
                sequence.prefilled = min(max(sequence.prefilled, sequence.done), len(sequence.prompt))
                if sequence.done == len(sequence.tokens):
                    self._take(sequence, outcome[-1])
                self._observe(sequence, seen)
            began, before = start
            phase.add(0, time.perf_counter() - began, self.meter.read() - before)
        finally:  # after a bug, too: nobody else tells those that have ended
            for sequence in batch:  # last, so that a client finds its token in the counters
                sequence.tell()

    def _forward(
        self, batch: list[Sequence], segments: list[Segment], watch: Watch, prefill: bool, states: Tensor
    ) -> abc.Sequence[Tensor | TierlmError]:
        """Per segment: the logits of its last token in prefill, and of all its tokens in decode, float32 [n, vocab]; or
        the error. ``states`` [T, hidden]: see Decoder.forward; [T, 0]: not wanted."""
        logits = batch[0].logits
        out = None if logits is None else logits[batch[0].done :][: len(segments[0].ids)]
        try:
            wanted = states if states.numel() else None
            look = functools.partial(self._look, batch, segments, watch, itertools.count())
            found = self.decoder.forward(segments, prefill=prefill, out=out, states=wanted, watch=look)
            if out is not None:
                return [found[-1:]]
            return found.split_with_sizes([1 if prefill else len(segment.ids) for segment in segments])
        except (StorageError, NumericsError) as error:
            if len(batch) == 1 and (prefill or len(segments[0].ids) == 1):
                return [error]
        if len(batch) == 1:  # without its drafts, which may be what failed
            return self._forward(batch, [Segment(segments[0].ids[:1], segments[0].span)], watch, prefill, states[:1])
        rows = [len(segment.ids) for segment in segments]
        # Retried alone, so that one sequence's failure does not fail the batch.
        return [
            self._forward([sequence], [segment], watch, prefill, seen)[0]
            for sequence, segment, seen in zip(batch, segments, states.split_with_sizes(rows), strict=True)
        ]

    def _look(self, batch: list[Sequence], segments: list[Segment], watch: Watch, layers: abc.Iterator[int]) -> None:
        """Before each layer of a step: note how far its prompts are, and call ``watch``."""
        layer = next(layers)
        for sequence, segment in zip(batch, segments, strict=True):
            if sequence.state is State.PREFILL:
                done = sequence.done + len(segment.ids) * layer // len(self.decoder.spec.layers)
                sequence.prefilled = min(max(sequence.prefilled, done), len(sequence.prompt))
        watch(batch)

    def _observe(self, sequence: Sequence, states: Tensor) -> None:
        if self.speculation is not None and self.speculation.width and not sequence.ended and sequence.logits is None:
            self.speculation.observe(sequence, states)

    def _verify(self, sequence: Sequence, drafts: abc.Sequence[int], logits: Tensor) -> int:
        """Take a token, and further ones while the last one is what was drafted, so that the logits after it are known.
        Returns the number of tokens. ``logits``: [1 + drafts, vocab]."""
        assert sequence.span is not None
        counted = self.counters.drafts
        counted.turns, counted.drafted = counted.turns + 1, counted.drafted + len(drafts)
        sequence.span.retract(len(drafts))
        self._take(sequence, logits[0])
        for taken, draft in enumerate(drafts, 1):
            if sequence.ended or sequence.ids[-1] != draft:
                return taken
            counted.accepted += 1
            sequence.span.advance(1)
            self._take(sequence, logits[taken])
        return 1 + len(drafts)

    def _take(self, sequence: Sequence, logits: Tensor) -> None:
        """Sample the next token and end the sequence if it is the last."""
        if sequence.logits is not None:
            self._end(sequence, "length")
            return
        params = sequence.params
        try:
            token = sequence.sampler.choose(logits, sequence.prompt, sequence.ids)
        except TierlmError as error:  # of its constraint
            sequence.error = error
            self._end(sequence, "error")
            return
        if sequence.state is State.PREFILL:
            self.counters.first_tokens += 1
        if not sequence.ids:
            self.counters.first_token = time.perf_counter() - sequence.submitted
        sequence.ids.append(token)
        if params.logprobs is not None:
            sequence.logprobs.append(logprob_of(logits, token, params.logprobs))
        sequence.state = State.DECODE
        if (token in self.eos and not params.ignore_eos) or token in params.stop_ids:
            self._end(sequence, "stop")
        elif len(sequence.ids) >= sequence.limit:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, finish: str | None) -> None:
        self._stored.end(sequence)
        self._prefixes.keep(sequence)
        self._running.remove(sequence)
        sequence.span, sequence.finish, sequence.state, sequence.request = None, finish, State.ENDED, None


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


def _growth(running: abc.Iterable[Sequence]) -> int:
    """Tokens that ``running`` sequences may soon grow by."""
    return sum(min(ROOM, one.most - one.span.capacity) for one in running if one.span is not None)
