"""Residency of the routed experts, as the model sees it: acquire what a layer needs, hint at what comes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from tierlm.checkpoints.checkpoint import Record
from tierlm.checkpoints.formats import Weights
from tierlm.memory.heat import Heat
from tierlm.memory.slots import Entry
from tierlm.memory.ticket import DISK, Priority
from tierlm.memory.tiers import Source, Tier
from tierlm.memory.transfer import LinkStats
from tierlm.policies.prefetch import Prefetch
from tierlm.spec import ExpertKey, Key
from tierlm.timeline import span


class Store:
    """Leases of expert records in the compute tier. Used from one thread. ``stall``: seconds waited for transfers;
    ``exact``: see kernels.Weight."""

    def __init__(
        self,
        tier: Tier,
        records: Callable[[Key], Record],
        io_timeout: float,
        heat: Heat | None = None,
        exact: bool = False,
    ):
        self.tier, self.records, self.io_timeout, self.exact = tier, records, io_timeout, exact
        self.heat = heat or Heat()
        self.stall = 0.0
        self.prefetch = Prefetch()
        self._hints: dict[int, tuple[list[ExpertKey], bool]] = {}  # by layer: what is to be read, and is it a prefill
        self._likely: dict[int, list[ExpertKey]] = {}  # by layer: all that was guessed
        self._cores = os.cpu_count() or 1
        self._link = LinkStats()  # as it was when the time of a read was last measured

    def acquire(self, layer: int, experts: Sequence[int], *, streaming: bool = False) -> Leases:
        """Leases of ``experts`` (each once) of ``layer``: ``with store.acquire(...) as leases: for batch in leases: for
        expert, weights in batch``. Reads begin on entering; experts come resident first, then as they arrive, each
        batch leased until the next.

        ``streaming``: a prefill, which goes through a few slots, in the order of the disk, and leaves the warm records
        where they are. Raises StorageError when a read fails or stalls; every lease ends with the ``with`` block,
        whatever happens in it.
        """
        return Leases(self, layer, [ExpertKey(layer, expert) for expert in experts], streaming)

    def hint(self, layer: int, keys: Sequence[ExpertKey], *, ahead: int, streaming: bool) -> None:
        """``keys`` of ``layer``, likeliest first, are likely to be demanded ``ahead`` layers from now. What is there
        stays; of what is not, what is worth it is read behind every demand, as far as there is room for guesses.
        """
        wanted = set(keys)
        self.tier.cancel_stale(
            lambda key: isinstance(key, ExpertKey) and key.layer == layer and key not in wanted, begun=False
        )
        self._likely[layer] = list(keys)
        self.tier.protect(key for likely in self._likely.values() for key in likely)
        absent = [key for key in keys if key not in self.tier.entries]
        if not absent:
            self._hints.pop(layer, None)
            return
        self._measure()
        average = self.prefetch.read_seconds.value / max(1, self.tier.slots[0].size)
        backlog = self.tier.transfer.backlog() * average
        chosen = self.prefetch.choose(layer, absent, ahead, streaming, backlog)
        self._hints[layer] = (self.in_order(chosen) if streaming else chosen, streaming)
        self.follow()

    def follow(self) -> None:
        """Start the reads of hints, the next layer's first, as far as there are slots."""
        for hints, streaming in self._hints.values():
            while hints:
                key = hints[0]
                absent = key not in self.tier.entries
                if absent and self.tier.start(key, priority=Priority.PREFETCH, streaming=streaming) is None:
                    return
                hints.pop(0)

    def warm(self, keys: Sequence[ExpertKey]) -> None:
        """Fill the free slots with ``keys``, the most wanted first, in the background; what is left of them goes to
        the tier below. Policies learn how hot each is."""
        tier: Source = self.tier
        waiting = list(keys)
        while isinstance(tier, Tier):
            for key in keys:
                tier.policy.expect(key, self.heat.share(key))
            while waiting and (waiting[0] in tier.entries or tier.start(waiting[0], priority=Priority.WARM_UP)):
                waiting.pop(0)
            tier = tier.source

    def turn(self, layer: int, needed: Sequence[ExpertKey]) -> None:
        """``layer`` runs now: what was guessed about it and is not ``needed`` has been wrong."""
        wanted = set(needed)
        self.heat.note(layer, needed)
        self.prefetch.turn(layer, wanted)
        self._hints.pop(layer, None)
        if self._likely.pop(layer, None) is not None:
            self.tier.protect(key for likely in self._likely.values() for key in likely)
        self.tier.cancel_stale(lambda key: isinstance(key, ExpertKey) and key.layer == layer and key not in wanted)

    def in_order(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """``keys`` as they lie on the disk."""

        def place(key: ExpertKey) -> tuple[str, int]:
            first = self.records(key).extents[0]
            return str(first.file), first.start

        return sorted(keys, key=place)

    def _measure(self) -> None:
        """Take what the disk has delivered since the last time into the time of a read."""
        now, before = self.tier.transfer.busy().get(DISK, LinkStats()), self._link
        size = self.tier.slots[0].size
        moved = now.bytes - before.bytes
        if moved >= size:
            self.prefetch.read_seconds.add((now.seconds - before.seconds) * size / moved)
            self.prefetch.read_cpu.add((now.cpu - before.cpu) * size / moved / self._cores)
            self._link = now

    def wait(self, entries: Sequence[Entry]) -> None:
        """Wait until one of ``entries`` has arrived, or failed."""
        tickets = [entry.ticket for entry in entries if entry.ticket is not None]
        if len(tickets) < len(entries):
            return
        tickets = tickets or self.tier.in_flight()
        if not tickets:
            raise RuntimeError(f"{self.tier.name}: no slot can be had, and nothing is on its way: a bug of tierlm")
        began = time.perf_counter()
        try:
            with span(self.tier.transfer.timeline, "wait", self.tier.name):
                self.tier.transfer.wait_any(tickets, self.io_timeout)
        finally:
            self.stall += time.perf_counter() - began
        self.tier.settle()


class Leases:
    """What ``Store.acquire`` returns: a context manager, iterable once inside."""

    def __init__(self, store: Store, layer: int, keys: list[ExpertKey], streaming: bool):
        self._store, self._tier, self._layer, self._streaming = store, store.tier, layer, streaming
        self._keys = keys
        self._held: dict[ExpertKey, Entry] = {}
        self._missing: list[ExpertKey] = []
        self._joined: set[ExpertKey] = set()  # those whose read was under way already
        self._read = 0  # records that were absent, or would have been without a guess
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
        spent = time.perf_counter() - self._began - (self._store.stall - self._stalled)
        self._store.prefetch.layer_done(self._read, spent, self._streaming)

    def __iter__(self) -> Iterator[list[tuple[int, Weights]]]:
        """Batches of (expert, weights): all that are there, the first time even none, since there may be other work to
        do meanwhile. One at a time where they are streamed through, so that each slot is free for the next read as soon
        as it can be."""
        first = True
        while self._held or self._missing:
            self._tier.settle()
            ready = [key for key, entry in self._held.items() if entry.ticket is None]
            for key in [key for key in ready if self._held[key].error is not None and key in self._joined]:
                self._joined.remove(key)  # a guess has failed, which is nobody's error yet: now it is demanded
                self._tier.stats.late_hits -= 1  # and counted as what it turns out to be
                self._release(key)
                self._missing.append(key)
                ready.remove(key)
            self._start_missing()
            if not ready and not first:
                self._store.wait(list(self._held.values()))
                self._start_missing()
            for batch in [[key] for key in ready] if self._streaming and ready else [ready] * (first or bool(ready)):
                yield [(key.expert, self._weights(key)) for key in batch]
                for key in batch:
                    self._release(key)
                self._start_missing()
            first = False

    def _weights(self, key: ExpertKey) -> Weights:
        entry = self._held[key]
        if entry.error is not None:
            raise entry.error
        return entry.slot.weights(self._store.records(key), self._store.exact)

    def _start_missing(self) -> None:
        """Start as many reads as there are slots for, in order, and what was hinted at behind them."""
        while self._missing:
            key = self._missing[0]
            entry = self._tier.demand(key, streaming=self._streaming) or self._tier.start(
                key, streaming=self._streaming
            )
            if entry is None:
                return
            self._held[self._missing.pop(0)] = entry
        self._store.follow()

    def _release(self, key: ExpertKey) -> None:
        self._tier.unpin(self._held.pop(key))
