"""KV values of sequences on disk: written as they come, and read before a prompt is computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tierlm.engine.counters import Phase
from tierlm.engine.sequence import Sequence
from tierlm.memory.kvblock import extend
from tierlm.memory.kvcache import KvCache
from tierlm.memory.kvdisk import KvDisk, KvTier
from tierlm.memory.kvmover import Move
from tierlm.planning.reuse import loading_pays
from tierlm.policies.chains import BlockKey

STALLED = 5.0  # seconds without a block after which the rest is computed
TICK = 0.05  # seconds of one wait


@dataclass(slots=True, eq=False)
class Load:
    """Blocks on their way into a span. ``keys``: all of them; ``moves``: reads begun, in order. ``since``: when the
    last came."""

    keys: list[BlockKey]
    begun: int = 0
    moves: deque[Move] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)


class StoredPrefixes:
    """The KV values on ``disk``, if there is one, of sequences with a ``keep``: any of them finds those of its prompt.

    A thread of the disk moves blocks between its buffers and files. Buffers and spans meet here only, between steps, so
    a sequence loads while others run, and spans may be moved at any time. ``prefill``: what prompts
    have taken so far.
    """

    def __init__(self, cache: KvCache, disk: KvDisk | None, prefill: Phase):
        self._cache, self._disk, self._prefill = cache, disk, prefill
        self._chains: dict[Sequence, list[BlockKey]] = {}  # blocks that were stored, or found
        self._loads: dict[Sequence, Load] = {}

    def tiers(self) -> dict[str, KvTier]:
        """The counters, by tier. Any thread may read them."""
        return {} if self._disk is None else {"disk": self._disk.snapshot()}

    def begin(self, sequence: Sequence) -> bool:
        """Begin to read what is on disk of the prompt and not in the span. False if nothing is read."""
        if (disk := self._disk) is None or not _wanted(sequence) or sequence.span is None:
            return False
        tokens, known, chain = disk.layout.tokens, sequence.span.length, list[BlockKey]()
        extend(chain, disk.identity, sequence.tokens[:-1], tokens)
        keys = chain[known // tokens : disk.find(chain)]
        missing = len(keys) * tokens - known % tokens
        if not keys or missing <= 0:
            return False
        if not loading_pays(missing, len(keys) * disk.layout.stored, disk.speed, self._prefill.rate):
            disk.tier.skipped += missing
            return False
        disk.pin(keys)
        self._loads[sequence] = Load(keys)
        self._advance(sequence)
        return True

    def arrived(self) -> list[Sequence]:
        """Fill spans with the blocks that have come. Returns the sequences that wait for no more."""
        if self._loads and self._disk is not None:
            self._disk.collect()  # the buffers of ended writes
        return [sequence for sequence in list(self._loads) if self._advance(sequence)]

    def wait(self) -> None:
        """Wait a moment for the next block."""
        for load in self._loads.values():
            if load.moves and self._disk is not None:
                self._disk.wait(load.moves[0], TICK)
                return
        time.sleep(TICK / 10)  # writes have all buffers

    def store(self, sequences: Iterable[Sequence]) -> None:
        """Begin to write the blocks that are full by now, as far as buffers are free."""
        if (disk := self._disk) is None or not disk.writable:
            return
        tokens = disk.layout.tokens
        for sequence in sequences:
            if not _wanted(sequence) or (span := sequence.span) is None or sequence in self._loads:
                continue
            chain = self._chains.setdefault(sequence, [])
            if span.length // tokens <= len(chain):
                continue
            disk.collect()
            extend(chain, disk.identity, sequence.computed, tokens)
            ours = set(chain)
            for key in chain:
                rows = self._cache.rows(span, key.depth * tokens, (key.depth + 1) * tokens)
                if not disk.put(key, rows, ours):
                    del chain[key.depth :]  # until the next step
                    break

    def end(self, sequence: Sequence) -> None:
        """Store what can be, and forget ``sequence``. Call it before its span is kept or released."""
        if (disk := self._disk) is None:
            return
        if (load := self._loads.pop(sequence, None)) is not None:
            self._leave(load)
        self.store([sequence])
        chain = self._chains.pop(sequence, None)
        if chain is not None and sequence.span is not None and disk.writable:
            tokens = disk.layout.tokens
            disk.tier.dropped += (sequence.span.length // tokens - len(chain)) * tokens

    def _advance(self, sequence: Sequence) -> bool:
        """Whether the load of ``sequence`` has ended, with all of its blocks or an error."""
        load, disk, span = self._loads[sequence], self._disk, sequence.span
        assert disk is not None and span is not None
        tokens, failed = disk.layout.tokens, False
        while load.moves and load.moves[0].done and not failed:
            move = load.moves.popleft()
            if move.error is None:
                start = move.header.key.depth * tokens
                rows = self._cache.rows(span, span.length, start + tokens)
                for values, part in zip(rows, disk.layout.rows(move.buffer.tensor), strict=True):
                    values.copy_(part[span.length - start :])
                disk.tier.hit_tokens += start + tokens - span.length
                disk.tier.hit_bytes += disk.layout.stored
                span.length, load.since = start + tokens, time.monotonic()
            failed = move.error is not None
            disk.release(move)
        failed = failed or time.monotonic() - load.since > STALLED
        while not failed and load.begun < len(load.keys) and (read := disk.read(load.keys[load.begun])) is not None:
            load.moves.append(read)
            load.begun += 1
        if failed or (load.begun == len(load.keys) and not load.moves):
            self._leave(self._loads.pop(sequence))
            return True
        return False

    def _leave(self, load: Load) -> None:
        assert self._disk is not None
        for move in load.moves:
            self._disk.release(move)
        self._disk.unpin(load.keys)


def _wanted(sequence: Sequence) -> bool:
    return sequence.keep is not None and sequence.keep.stored
