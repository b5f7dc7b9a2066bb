"""Simulated tiers, as memory/tiers.py: the engine's residency, and links over a clock for transfers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tierlm.policies import residency
from tierlm.policies.eviction import Policy
from tierlm.policies.residency import EntryState, Purpose, Residency
from tierlm.spec import ExpertKey, Key
from tierlm.tracing.link import Link


@dataclass(slots=True, eq=False)
class Entry(residency.Entry):
    """A record in a tier. ``source``: the entry below that it is copied from. ``queued``: its transfer is on the link;
    a copy is queued when its source arrives. ``there``: its time of arrival."""

    source: Entry | None = None
    queued: bool = False
    there: float = 0.0


class SimulatedTier:
    """Slots for records of one size, filled over ``link`` from the tier below, or from the disk."""

    def __init__(self, policy: Policy, slots: int, link: Link, source: SimulatedTier | None = None):
        self.residency = Residency[Entry](policy, [1] * slots, lambda key: 1)
        self.stats = self.residency.stats
        self.link, self.source = link, source

    def demand(self, key: Key, streaming: bool, now: float) -> Entry | None:
        entry = self.residency.demand(key, streaming)
        if entry is not None and entry.state is EntryState.LOADING:
            self._promote(entry, now)
        return entry

    def start(self, key: ExpertKey, purpose: Purpose, streaming: bool, now: float) -> Entry | None:
        """Begin to bring in the absent ``key``. None: no slot is available now."""
        self.settle(now)
        placement = self.residency.find(key, purpose, streaming)
        if placement is None:
            return None
        source = None if self.source is None else self.source._lend(key, purpose, streaming, now)
        if source is None and self.source is not None:
            return None
        entry = Entry(key, placement.index, purpose, streaming and placement.displaces, source=source)
        self.residency.admit(entry, placement)
        if placement.victim is not None and self.source is not None:
            self.source.residency.keep(placement.victim.key)
        if source is None or source.state is EntryState.RESIDENT:
            self._queue(entry, now)
        return entry

    def end_turn(self, layer: int) -> None:
        self.residency.end_turn(layer)
        if self.source is not None:
            self.source.end_turn(layer)

    def cancel_stale(self, layer: int, wanted: Collection[Key], now: float, *, begun: bool = True) -> None:
        """Drop the prefetches for ``layer`` that are not ``wanted``; those that have begun only if ``begun``."""
        if not self.residency.prefetched:
            return
        self.settle(now)
        for entry in self.residency.stale(layer, wanted):
            loading = entry.state is EntryState.LOADING
            if loading and (not entry.queued or self.link.cancel(entry.key, now)):
                self._end_transfer(entry)
                self.residency.cancel(entry)
            elif begun:
                self.residency.waste(entry)

    def settle(self, now: float) -> None:
        """Record the arrivals by ``now``."""
        if self.source is not None:
            self.source.settle(now)
        if not self.residency.loading:
            return
        for entry in self.residency.loading.values():
            if not entry.queued and entry.source is not None and entry.source.state is EntryState.RESIDENT:
                self._queue(entry, entry.source.there)
        arrived = self.link.arrived(now)
        for key, entry in [item for item in self.residency.loading.items() if item[0] in arrived]:
            entry.there = arrived[key]
            self._end_transfer(entry)
            self.residency.arrived(entry)

    def chain(self) -> list[SimulatedTier]:
        """This tier and those below it."""
        return [self, *([] if self.source is None else self.source.chain())]

    def next_arrival(self) -> float:
        """When the next record arrives, here or below; infinite: none is in flight."""
        below = math.inf if self.source is None else self.source.next_arrival()
        return min(below, self.link.next_arrival())

    def _lend(self, key: ExpertKey, purpose: Purpose, streaming: bool, now: float) -> Entry | None:
        """The entry from which the tier above copies ``key``, pinned."""
        demanded = purpose is Purpose.DEMAND
        entry = self.demand(key, streaming, now) if demanded else self.residency.entries.get(key)
        entry = entry or self.start(key, purpose, streaming, now)
        if entry is not None and not demanded:
            self.residency.lend(entry)
        return entry

    def _queue(self, entry: Entry, since: float) -> None:
        entry.queued = True
        self.link.submit(entry.key, since, prefetch=entry.purpose is Purpose.PREFETCH)

    def _promote(self, entry: Entry, now: float) -> None:
        self.link.promote(entry.key, now)
        if entry.source is not None and self.source is not None:
            self.source._promote(entry.source, now)

    def _end_transfer(self, entry: Entry) -> None:
        if entry.source is not None and self.source is not None:
            self.source.residency.copied(entry.source)
            entry.source = None


def build_tiers(tiers: Sequence[tuple[Policy, int]], links: Sequence[Link]) -> SimulatedTier:
    """Build tiers of (policy, slots), the top first, each with its link. Returns the top one."""
    top: SimulatedTier | None = None
    for (policy, slots), link in reversed(list(zip(tiers, links, strict=True))):
        top = SimulatedTier(policy, slots, link, top)
    assert top is not None
    return top
