"""The model's view of the routed experts: acquire those a layer needs, prefetch those predicted next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from tierlm.checkpoints.record import Record
from tierlm.checkpoints.views import Weights
from tierlm.memory.executor import LinkStats
from tierlm.memory.heat import Heat
from tierlm.memory.slots import Entry
from tierlm.memory.ticket import DISK
from tierlm.memory.tiers import Tier
from tierlm.policies.lookahead import Lookahead
from tierlm.policies.residency import Purpose
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
        self._link = LinkStats()  # at the last measurement of read time

    def acquire(self, layer: int, experts: Sequence[int], *, streaming: bool = False) -> Leases:
        """Leases of distinct ``experts`` of ``layer``, for a ``with`` statement. Reads start on entry. Inside, call
        ``leases.resident()`` first, then ``for batch in leases``; a batch is leased until the next one is requested.

        ``streaming``: a prefill; it uses a few slots, in disk order, and evicts few warm records. Raises
        StorageError when a read fails or stalls. All leases end with the ``with`` block, also after an error.
        """
        return Leases(self, layer, [ExpertKey(layer, expert) for expert in experts], streaming)

    def look_ahead(self, layer: int, ahead: int, streaming: bool, rows: Sequence[Sequence[int]] | None = None) -> None:
        """Predict the demands of ``layer``, ``ahead`` MoE layers from now. Resident records are protected; absent
        records worth reading queue behind all demand reads while slots last. ``rows``: see Lookahead.predict."""
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
        """Start planned prefetches while slots last."""
        tier, lookahead = self.tier, self.lookahead
        while (wanted := lookahead.next_read(tier.entries)) is not None:
            key, streaming = wanted
            if tier.start(key, purpose=Purpose.PREFETCH, streaming=streaming) is None:
                return

    def turn(self, layer: int, needed: Sequence[ExpertKey]) -> None:
        """Begin ``layer``: judge the predictions for it and drop prefetches that are not ``needed``."""
        wanted = set(needed)
        self.heat.note(layer, needed)
        self.lookahead.turn(layer, wanted)
        self.tier.protect(layer, ())
        self.tier.cancel_stale(layer, wanted)

    def warm(self, keys: Sequence[ExpertKey]) -> None:
        """Fill the free slots of all tiers with ``keys``, hottest first. Policies learn the heat of each key."""
        self.tier.warm(keys, {key: self.heat.share(key) for key in keys})

    def wait(self, entries: Sequence[Entry]) -> None:
        """Wait until one of ``entries`` has arrived or failed."""
        self.tier.wait(entries, self.io_timeout)

    def in_order(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """``keys`` in disk order."""
        return sorted(keys, key=lambda key: self.records(key).begin)

    def _measure(self) -> None:
        """Update the predicted time of a read from the disk's throughput since the last call."""
        now, before = self.tier.transfer.busy().get(DISK, LinkStats()), self._link
        size = self.tier.slots[0].size
        moved = now.bytes - before.bytes
        if moved >= size:
            seconds, cpu = (now.seconds - before.seconds) * size / moved, (now.cpu - before.cpu) * size / moved
            self.lookahead.prefetch.read(seconds, cpu / self._cores)
            self._link = now


Batch = list[tuple[int, Weights]]  # expert ids and their weights


class Leases:
    """The context manager of ``Store.acquire``: call ``resident`` once, then iterate once."""

    def __init__(self, store: Store, layer: int, keys: list[ExpertKey], streaming: bool):
        self._store, self._tier, self._layer, self._streaming = store, store.tier, layer, streaming
        self._keys = keys
        self._leased: dict[ExpertKey, Entry] = {}
        self._batch: list[ExpertKey] = []  # the batch the caller has now
        self._missing: list[ExpertKey] = []
        self._joined: set[ExpertKey] = set()  # their reads were already in flight
        self._read = 0  # records read on demand or by a useful prefetch
        self._began, self._stalled = time.perf_counter(), store.tier.stall

    def __enter__(self) -> Leases:
        self._tier.settle()
        self._store.turn(self._layer, self._keys)
        for key in self._keys:
            useful = self._tier.stats.useful
            entry = self._tier.demand(key, streaming=self._streaming)
            if entry is None:
                self._missing.append(key)
            else:
                self._leased[key] = entry
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
        for key in list(self._leased):
            self._release(key)
        self._tier.end_turn(self._layer)  # policies learn last, while prefetch reads are in flight
        spent = time.perf_counter() - self._began - (self._tier.stall - self._stalled)
        self._store.lookahead.prefetch.layer_done(self._read, spent, self._streaming)

    def resident(self) -> Batch:
        """The first batch: the experts resident now, without a wait. It may be empty, so the caller can overlap other
        work. When streaming, it holds at most one expert."""
        ready = self._ready()
        return self._lend(ready[:1] if self._streaming else ready)

    def __iter__(self) -> Iterator[Batch]:
        """Yield non-empty batches as experts arrive. When streaming, a batch is one expert, so that each slot is reused
        for the next read at once."""
        self._end_batch()
        while self._leased or self._missing:
            ready = self._ready()
            if not ready:
                self._tier.wait(list(self._leased.values()), self._store.io_timeout)
                self._start_missing()
                continue
            for batch in [[key] for key in ready] if self._streaming else [ready]:
                yield self._lend(batch)
                self._end_batch()

    def _ready(self) -> list[ExpertKey]:
        """Leased experts whose reads have arrived or failed. A failed prefetch is read again as a demand."""
        self._tier.settle()
        ready = [key for key, entry in self._leased.items() if entry.ticket is None]
        for key in [key for key in ready if self._leased[key].error is not None and key in self._joined]:
            self._joined.remove(key)
            self._tier.stats.late_hits -= 1  # the demand that follows is counted instead
            self._release(key)
            self._missing.append(key)
            ready.remove(key)
        self._start_missing()
        return ready

    def _lend(self, batch: list[ExpertKey]) -> Batch:
        self._batch = batch
        return [(key.expert, self._weights(key)) for key in batch]

    def _end_batch(self) -> None:
        """End the leases of the last batch and reuse its slots."""
        for key in self._batch:
            self._release(key)
        self._batch = []
        self._start_missing()

    def _weights(self, key: ExpertKey) -> Weights:
        entry = self._leased[key]
        if entry.error is not None:
            raise entry.error
        return entry.slot.weights(self._store.records(key), self._store.exact)

    def _start_missing(self) -> None:
        """Start missing reads in order while slots last, then planned prefetches."""
        while self._missing:
            key = self._missing[0]
            entry = self._tier.demand(key, streaming=self._streaming) or self._tier.start(
                key, streaming=self._streaming
            )
            if entry is None:
                return
            self._leased[self._missing.pop(0)] = entry
        self._store.start_reads()

    def _release(self, key: ExpertKey) -> None:
        self._tier.unpin(self._leased.pop(key))
