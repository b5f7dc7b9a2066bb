"""Residency of the routed experts, as the model sees it: acquire what a layer needs, hint at what comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from tierlm.memory.slots import Entry
from tierlm.memory.tiers import Tier
from tierlm.spec import ExpertKey, Key
from tierlm.weights.checkpoint import Record
from tierlm.weights.formats import Weights, weights_of

WORTHWHILE = 0.7  # a first choice on thin evidence: docs/results.md
PROBE = 16
MEMORY = 64  # guesses


class Store:
    """Leases of expert records in the compute tier. Used from one thread. ``stall``: seconds waited for transfers."""

    def __init__(self, tier: Tier, records: Callable[[Key], Record], io_timeout: float):
        self.tier, self.records, self.io_timeout = tier, records, io_timeout
        self.stall = 0.0
        self._precision = 1.0  # running share of guesses that were demanded
        self._judged = (0, 0)  # useful and wasted guesses already counted in it
        self._hints = 0

    def acquire(self, layer: int, experts: Sequence[int], *, passing: bool = False) -> Leases:
        """Leases of ``experts`` (each once) of ``layer``: ``with store.acquire(...) as leases: for batch in leases: for
        expert, weights in batch``. Reads begin on entering; experts come resident first, then as they arrive, each
        batch leased until the next.

        ``passing``: a prefill, which streams through a few slots and leaves the warm records where they are. Raises
        StorageError when a read fails or stalls; every lease ends with the ``with`` block, whatever happens in it.
        """
        return Leases(self, [ExpertKey(layer, expert) for expert in experts], passing)

    def hint(self, keys: Sequence[ExpertKey]) -> None:
        """Begin to read ``keys``, likeliest first, behind every demand, as far as there is room for guesses.

        A wrong guess costs a read of the link and of the cores. Where fewer than WORTHWHILE of the last guesses came to
        use, only every PROBE-th hint is followed, to notice when that changes.
        """
        self._judge()
        self._hints += 1
        if self._precision < WORTHWHILE and self._hints % PROBE:
            return
        for key in keys:
            if key not in self.tier.entries and self.tier.start(key, speculative=True) is None:
                return

    def _judge(self) -> None:
        """Take the guesses whose worth has shown since the last time into the running precision."""
        stats = self.tier.stats
        useful, wasted = stats.useful - self._judged[0], stats.wasted - self._judged[1]
        self._judged = (stats.useful, stats.wasted)
        if useful + wasted:
            weight = min(1.0, (useful + wasted) / MEMORY)
            self._precision += weight * (useful / (useful + wasted) - self._precision)

    def wait(self, entries: Sequence[Entry]) -> None:
        """Wait until one of ``entries`` has arrived, or failed."""
        tickets = [entry.ticket for entry in entries if entry.ticket is not None] or self.tier.in_flight()
        if not tickets:
            raise RuntimeError(f"{self.tier.name}: no slot can be had, and nothing is on its way: a bug of tierlm")
        began = time.perf_counter()
        try:
            self.tier.transfer.wait_any(tickets, self.io_timeout)
        finally:
            self.stall += time.perf_counter() - began
        self.tier.settle()


class Leases:
    """What ``Store.acquire`` returns: a context manager, iterable once inside."""

    def __init__(self, store: Store, keys: list[ExpertKey], passing: bool):
        self._store, self._tier, self._keys, self._passing = store, store.tier, keys, passing
        self._held: dict[ExpertKey, Entry] = {}
        self._missing: list[ExpertKey] = []

    def __enter__(self) -> Leases:
        self._tier.settle()
        wanted = set(self._keys)
        layer = self._keys[0].layer if self._keys else -1
        self._tier.cancel_stale(lambda key: key.layer == layer and key not in wanted)
        for key in self._keys:
            entry = self._tier.demand(key)
            if entry is None:
                self._missing.append(key)
            else:
                self._held[key] = entry
        self._start_missing()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._held):
            self._release(key)

    def __iter__(self) -> Iterator[list[tuple[int, Weights]]]:
        """Batches of (expert, weights): all that are there. One at a time where they are streamed through, so that
        each slot is free for the next read as soon as it can be."""
        while self._held or self._missing:
            self._tier.settle()
            ready = [key for key, entry in self._held.items() if entry.ticket is None]
            if not ready:
                self._store.wait(list(self._held.values()))
                self._start_missing()
            for batch in [[key] for key in ready] if self._passing else [ready] * bool(ready):
                yield [(key.expert, self._weights(key)) for key in batch]
                for key in batch:
                    self._release(key)
                self._start_missing()

    def _weights(self, key: ExpertKey) -> Weights:
        entry = self._held[key]
        if entry.error is not None:
            raise entry.error
        if entry.weights is None:
            entry.weights = weights_of(entry.slot.buffer, self._store.records(key))
        return entry.weights

    def _start_missing(self) -> None:
        """Start as many reads as there are slots for, in order."""
        while self._missing:
            entry = self._tier.demand(self._missing[0]) or self._tier.start(self._missing[0], passing=self._passing)
            if entry is None:
                return
            self._held[self._missing.pop(0)] = entry

    def _release(self, key: ExpertKey) -> None:
        self._tier.unpin(self._held.pop(key))
