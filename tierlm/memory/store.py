"""The routed experts, as the model sees them: acquire what a layer needs, look ahead to what comes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from tierlm.checkpoints.checkpoint import Record
from tierlm.checkpoints.views import Weights
from tierlm.memory.executor import LinkStats
from tierlm.memory.heat import Heat
from tierlm.memory.slots import Entry
from tierlm.memory.ticket import DISK, Priority
from tierlm.memory.tiers import Tier
from tierlm.policies.lookahead import Lookahead
from tierlm.spec import ExpertKey, Key


class Store:
    """Leases of expert records in the compute tier. Used from one thread. ``exact``: see kernels.Weight."""

    def __init__(
        self,
        tier: Tier,
        records: Callable[[Key], Record],
        lookahead: Lookahead,
        io_timeout: float,
        heat: Heat | None = None,
        exact: bool = False,
    ):
        self.tier, self.records, self.lookahead, self.io_timeout = tier, records, lookahead, io_timeout
        self.heat, self.exact = heat or Heat(), exact
        self._cores = os.cpu_count() or 1
        self._link = LinkStats()  # as it was when the time of a read was last measured

    @property
    def stall(self) -> float:
        """Seconds waited for transfers."""
        return self.tier.stall

    def acquire(self, layer: int, experts: Sequence[int], *, streaming: bool = False) -> Leases:
        """Leases of ``experts`` (each once) of ``layer``, for a ``with`` statement. Reads begin on entering. Inside,
        first ``leases.resident()``, then ``for batch in leases``; each batch is leased until the next is asked for.

        ``streaming``: a prefill, which goes through a few slots, in the order of the disk, and leaves the warm records
        where they are. Raises StorageError when a read fails or stalls; every lease ends with the ``with`` block,
        whatever happens in it.
        """
        return Leases(self, layer, [ExpertKey(layer, expert) for expert in experts], streaming)

    def look_ahead(self, layer: int, ahead: int, streaming: bool, rows: Sequence[Sequence[int]] | None = None) -> None:
        """Predict what ``layer`` demands, ``ahead`` MoE layers from now. What is resident is protected; absent records
        worth a read queue behind all demands, as far as there are slots. ``rows``: see Lookahead.predict."""
        lookahead, tier = self.lookahead, self.tier
        keys = lookahead.predict(layer, rows)
        tier.cancel_stale(layer, set(keys), begun=False)
        tier.protect(layer, keys)
        backlog, absent = 0.0, [key for key in keys if key not in tier.entries]
        if absent:
            self._measure()
            backlog = tier.transfer.backlog() / max(1, tier.slots[0].size)
        chosen = lookahead.choose(layer, absent, ahead, streaming, backlog)
        lookahead.plan(layer, self.in_order(chosen) if streaming else chosen, streaming)
        self.start_reads()

    def start_reads(self) -> None:
        """Start planned prefetches, as far as there are slots."""
        tier, lookahead = self.tier, self.lookahead
        while (wanted := lookahead.next_read(tier.entries)) is not None:
            key, streaming = wanted
            if tier.start(key, priority=Priority.PREFETCH, streaming=streaming) is None:
                return

    def turn(self, layer: int, needed: Sequence[ExpertKey]) -> None:
        """``layer`` runs now: predictions for it are judged, and prefetches that are not ``needed`` are dropped."""
        wanted = set(needed)
        self.heat.note(layer, needed)
        self.lookahead.turn(layer, wanted)
        self.tier.protect(layer, ())
        self.tier.cancel_stale(layer, wanted)

    def warm(self, keys: Sequence[ExpertKey]) -> None:
        """Fill the free slots of all tiers with ``keys``, the most wanted first. Policies learn how hot each is."""
        self.tier.warm(keys, {key: self.heat.share(key) for key in keys})

    def wait(self, entries: Sequence[Entry]) -> None:
        """Wait until one of ``entries`` has arrived, or failed."""
        self.tier.wait(entries, self.io_timeout)

    def in_order(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """``keys`` as they lie on the disk."""
        return sorted(keys, key=lambda key: self.records(key).begin)

    def _measure(self) -> None:
        """Take what the disk has delivered since the last time into the time of a read."""
        now, before = self.tier.transfer.busy().get(DISK, LinkStats()), self._link
        size = self.tier.slots[0].size
        moved = now.bytes - before.bytes
        if moved >= size:
            seconds, cpu = (now.seconds - before.seconds) * size / moved, (now.cpu - before.cpu) * size / moved
            self.lookahead.prefetch.read(seconds, cpu / self._cores)
            self._link = now


Batch = list[tuple[int, Weights]]  # of expert ids and their weights


class Leases:
    """What ``Store.acquire`` returns: a context manager; inside, ``resident`` once, then iterable once."""

    def __init__(self, store: Store, layer: int, keys: list[ExpertKey], streaming: bool):
        self._store, self._tier, self._layer, self._streaming = store, store.tier, layer, streaming
        self._keys = keys
        self._held: dict[ExpertKey, Entry] = {}
        self._lent: list[ExpertKey] = []  # the batch that the caller has
        self._missing: list[ExpertKey] = []
        self._joined: set[ExpertKey] = set()  # those whose read was under way already
        self._turn_open = True  # until all that is needed has been demanded
        self._read = 0  # records that were absent, or would have been without a prefetch
        self._began, self._stalled = time.perf_counter(), store.stall

    def __enter__(self) -> Leases:
        self._tier.settle()
        self._store.turn(self._layer, self._keys)
        for key in self._keys:
            useful = self._tier.stats.useful
            entry = self._tier.demand(key, streaming=self._streaming)
            if entry is None:
                self._missing.append(key)
            else:
                self._held[key] = entry
                self._read += self._tier.stats.useful - useful
                if entry.ticket is not None:
                    self._joined.add(key)
        self._read += len(self._missing)
        if self._streaming:
            self._missing = self._store.in_order(self._missing)
        self._start_missing()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._held):
            self._release(key)
        self._end_turn()
        spent = time.perf_counter() - self._began - (self._store.stall - self._stalled)
        self._store.lookahead.prefetch.layer_done(self._read, spent, self._streaming)

    def resident(self) -> Batch:
        """The first batch, without a wait: what is there now, possibly nothing. The caller computes it together with
        what needs no record. A streaming one is a single expert, as all batches are then."""
        ready = self._ready()
        return self._lend(ready[:1] if self._streaming else ready)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of what arrives, none empty: all that are there; one at a time where they are streamed through, so
        that each slot is free for the next read as soon as it can be."""
        self._end_batch()
        while self._held or self._missing:
            ready = self._ready()
            if not ready:
                self._tier.wait(list(self._held.values()), self._store.io_timeout)
                self._start_missing()
            for batch in [[key] for key in ready] if self._streaming else [ready] * bool(ready):
                yield self._lend(batch)
                self._end_batch()

    def _ready(self) -> list[ExpertKey]:
        """The held experts whose reads have ended, well or badly; a prefetch that failed is read again."""
        self._tier.settle()
        ready = [key for key, entry in self._held.items() if entry.ticket is None]
        for key in [key for key in ready if self._held[key].error is not None and key in self._joined]:
            self._joined.remove(key)  # nobody has demanded what failed: it is demanded now
            self._tier.stats.late_hits -= 1  # and counted as what it turns out to be
            self._release(key)
            self._missing.append(key)
            ready.remove(key)
        self._start_missing()
        return ready

    def _lend(self, batch: list[ExpertKey]) -> Batch:
        self._lent = batch
        return [(key.expert, self._weights(key)) for key in batch]

    def _end_batch(self) -> None:
        """End the leases of the last batch, and use its slots."""
        for key in self._lent:
            self._release(key)
        self._lent = []
        self._start_missing()

    def _weights(self, key: ExpertKey) -> Weights:
        entry = self._held[key]
        if entry.error is not None:
            raise entry.error
        return entry.slot.weights(self._store.records(key), self._store.exact)

    def _start_missing(self) -> None:
        """Start as many reads as there are slots for, in order, and planned prefetches behind them."""
        while self._missing:
            key = self._missing[0]
            entry = self._tier.demand(key, streaming=self._streaming) or self._tier.start(
                key, streaming=self._streaming
            )
            if entry is None:
                return
            self._held[self._missing.pop(0)] = entry
        self._end_turn()
        self._store.start_reads()

    def _end_turn(self) -> None:
        if self._turn_open:
            self._turn_open = False
            self._tier.end_turn(self._layer)

    def _release(self, key: ExpertKey) -> None:
        self._tier.unpin(self._held.pop(key))
