"""A tier: slots on a device, and the transfers that fill them. policies/residency.py decides who gets a slot.

Only the compute thread calls a tier. Transfers run elsewhere; a tier sees their end in ``settle``, so residency
changes only during calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

from tierlm.memory.jobs import CopyUp
from tierlm.memory.slots import Entry, Slot
from tierlm.memory.ticket import Ticket
from tierlm.memory.transfer import Transfer
from tierlm.policies.eviction import Policy
from tierlm.policies.residency import EntryState, Placement, Purpose, Residency
from tierlm.spec import Key
from tierlm.timeline import span


class Source(Protocol):
    """Where a tier gets its records: the disk or the tier below."""

    def fetch(self, key: Key, slot: Slot, purpose: Purpose, streaming: bool) -> tuple[Ticket, Entry | None] | None:
        """Start to read ``key`` into ``slot``. Returns the ticket and the entry below, pinned until the ticket is done;
        None if a tier on the way has no free slot now."""

    def settle(self) -> None:
        """Register finished transfers."""

    def copied(self, entry: Entry) -> None:
        """Unpin ``entry``: the copy out of it has ended."""

    def keep(self, key: Key) -> None:
        """The tier above has evicted ``key``."""

    def cancel_stale(self, layer: int, wanted: Collection[Key], *, begun: bool = True) -> None:
        """Drop prefetches for ``layer`` that are not ``wanted``; those that have begun only if ``begun``."""

    def end_turn(self, layer: int) -> None:
        """``layer`` has made all its demands of this step."""

    def warm(self, keys: Sequence[Key], shares: Mapping[Key, float]) -> None:
        """Fill free slots with ``keys``, hottest first; the rest goes to the source. ``shares``: for policies, the
        share of tokens that used each record in earlier runs."""

    def populate(self) -> None:
        """Have the memory of free slots committed ahead of need, also below."""

    def in_flight(self) -> list[Ticket]:
        """Transfers to this tier and to those below."""


class Tier:
    """Slots and their records. ``name``: "ram" or "vram". ``size_of``: bytes of a record. ``stall``: seconds waited for
    transfers."""

    def __init__(
        self,
        name: str,
        slots: list[Slot],
        source: Source,
        transfer: Transfer,
        policy: Policy,
        size_of: Callable[[Key], int],
    ):
        self.name, self.source, self.transfer, self.policy, self.size_of = name, source, transfer, policy, size_of
        self.residency = Residency[Entry](policy, [slot.size for slot in slots], size_of)
        self.entries, self.stats = self.residency.entries, self.residency.stats
        self.slots = list(slots)  # those not retired
        self.stall = 0.0
        self._slots = tuple(slots)  # by index, including retired ones
        devices = {slot.buffer.device for slot in slots if slot.buffer.device.type != "cpu"}
        streams = {device: torch.Stream(device) for device in devices}
        for slot in slots:
            slot.stream = streams.get(slot.buffer.device)

    def demand(self, key: Key, *, streaming: bool = False) -> Entry | None:
        """The entry of ``key`` for use now, resident or in flight, pinned and counted; None if it is absent.

        ``streaming``: a streamed record stays marked as streaming, and leaves first.
        """
        entry = self.residency.demand(key, streaming)
        if entry is not None and entry.ticket is not None:
            self.transfer.promote(entry.ticket)
        return entry

    def start(self, key: Key, *, purpose: Purpose = Purpose.DEMAND, streaming: bool = False) -> Entry | None:
        """Start to read ``key``, which is absent. A demanded entry is pinned. None if no slot is available now.

        ``streaming``: a record that displaces a warm record leaves first. A warm-up takes free slots only, and yields
        them to any other use until its read has begun.
        """
        self.settle()
        placement = self._find(key, purpose, streaming)
        if placement is None:
            return None
        index, victim = placement.index, placement.victim
        slot = self._slots[index]
        fetched = self.source.fetch(key, slot, purpose, streaming)
        if fetched is None:
            return None
        ticket, source = fetched
        entry = Entry(key, index, purpose, streaming and placement.displaces, slot=slot, ticket=ticket, source=source)
        self.residency.admit(entry, placement)
        if victim is not None:
            self.source.keep(victim.key)
        slot.filled = True
        return entry

    def _find(self, key: Key, purpose: Purpose, streaming: bool) -> Placement[Entry] | None:
        """Find a placement; cancels a warm-up in its way whose read has not begun."""
        while True:
            placement = self.residency.find(key, purpose, streaming)
            if placement is None or not placement.cancels:
                return placement
            assert placement.victim is not None
            if not self._cancel(placement.victim):
                self.residency.begun(placement.victim)

    def _cancel(self, entry: Entry) -> bool:
        """Cancel the read of ``entry``. False if it has begun."""
        if entry.ticket is None or not self.transfer.cancel(entry.ticket):
            return False
        self._end_transfer(entry)
        self.residency.cancel(entry)
        return True

    def protect(self, layer: int, keys: Collection[Key]) -> None:
        """Keep ``keys`` of ``layer`` while others can leave instead, until the next call for ``layer``."""
        self.residency.protect(layer, keys)

    def end_turn(self, layer: int) -> None:
        self.residency.end_turn(layer)
        self.source.end_turn(layer)

    def fetch(self, key: Key, slot: Slot, purpose: Purpose, streaming: bool) -> tuple[Ticket, Entry] | None:
        """As the source of the tier above: copy ``key`` up from a slot of this tier."""
        demanded = purpose is Purpose.DEMAND
        entry = self.demand(key, streaming=streaming) if demanded else self.entries.get(key)
        if entry is None:
            entry = self.start(key, purpose=purpose, streaming=streaming)
            if entry is None:
                return None
        if not demanded:
            self.residency.lend(entry)
        copy = CopyUp(f"{self.name}->vram", self.size_of(key), str(key), entry.slot, slot)
        return self.transfer.submit([copy], purpose=purpose, after=entry.ticket), entry

    def settle(self) -> None:
        """Register transfers that have arrived or failed."""
        self.source.settle()
        if not self.residency.loading:
            return
        for entry in list(self.residency.loading.values()):
            ticket = entry.ticket
            if ticket is None or not ticket.done:
                continue
            self._end_transfer(entry)
            if ticket.error is not None or ticket.cancelled:
                entry.error = ticket.error
                self.residency.discard(entry)
            else:
                self.residency.arrived(entry)

    def _end_transfer(self, entry: Entry) -> None:
        entry.ticket = None
        if entry.source is not None:
            self.source.copied(entry.source)
            entry.source = None

    def unpin(self, entry: Entry) -> None:
        """End a lease. The slot can be reused once the computation queued so far has ended."""
        entry.slot.release()
        self.residency.release(entry)

    def copied(self, entry: Entry) -> None:
        self.residency.copied(entry)

    def keep(self, key: Key) -> None:
        self.residency.keep(key)

    def cancel_stale(self, layer: int, wanted: Collection[Key], *, begun: bool = True) -> None:
        """Drop prefetches for ``layer`` that are not ``wanted``. If ``begun``, those whose read has begun are marked to
        leave first; otherwise they stay as they are, since ``layer`` has yet to run."""
        self.source.cancel_stale(layer, wanted, begun=begun)
        if self.residency.prefetched:
            self.settle()
            for entry in self.residency.stale(layer, wanted):
                if not self._cancel(entry) and begun:
                    self.residency.waste(entry)

    def warm(self, keys: Sequence[Key], shares: Mapping[Key, float]) -> None:
        for key, share in shares.items():
            self.policy.expect(key, share)
        for at, key in enumerate(keys):
            if key not in self.entries and self.start(key, purpose=Purpose.WARM_UP) is None:
                return self.source.warm(keys[at:], shares)
        return self.source.warm((), shares)

    def populate(self) -> None:
        """In the background, in the order of use, so that no demand waits for the system to find memory."""
        self.source.populate()
        empty = [self._slots[index] for index in self.residency.free]
        self.transfer.populate(slot for slot in empty if slot.memory is not None and not slot.filled)
        for slot in empty:
            slot.filled = True

    def in_flight(self) -> list[Ticket]:
        here = [entry.ticket for entry in self.residency.loading.values() if entry.ticket is not None]
        return self.source.in_flight() + here

    def wait(self, entries: Sequence[Entry], timeout: float) -> None:
        """Wait until one of ``entries`` (any transfer if empty) has arrived or failed. Raises the stalled read's error
        after ``timeout`` seconds."""
        tickets = [entry.ticket for entry in entries if entry.ticket is not None]
        if len(tickets) < len(entries):
            return
        tickets = tickets or self.in_flight()
        if not tickets:
            raise RuntimeError(f"{self.name}: no slot is free and nothing is in flight: this is a bug in tierlm")
        began = time.perf_counter()
        try:
            with span(self.transfer.timeline, "wait", self.name):
                self.transfer.wait_any(tickets, timeout)
        finally:
            self.stall += time.perf_counter() - began
        self.settle()

    def shrink(self, nbytes: int, least: int) -> int:
        """Return ``nbytes`` of memory to the system by retiring unpinned slots, but keep ``least`` slots. Returns the
        bytes freed. Slots never filled free nothing; they are retired first, so that they are not filled now. Warm-ups
        whose reads have not begun are dropped, and nothing is populated any more."""
        self.settle()
        for entry in self.residency.warm_ups():
            self._cancel(entry)
        for slot in self.slots:
            self.transfer.leave(slot)
        freed = 0
        for index in sorted(self.residency.free, key=lambda free: self._slots[free].filled):
            if len(self.slots) > least and (freed < nbytes or not self._slots[index].filled):
                freed += self._retire(index)
        for entry in self.residency.expendable() if freed < nbytes else ():
            if freed >= nbytes or len(self.slots) <= least:
                break
            self.residency.evict(entry)
            self.source.keep(entry.key)
            freed += self._retire(entry.index)
        return freed

    def grow(self, nbytes: int) -> int:
        """Restore retired slots of at most ``nbytes``. Returns the bytes."""
        taken, retired = 0, self.residency.retired
        while retired and taken + self._slots[retired[-1]].size <= nbytes:
            slot = self._slots[self.residency.restore()]
            self.slots.append(slot)
            taken += slot.size
        return taken

    @property
    def retired(self) -> int:
        """Number of slots whose memory was returned to the system."""
        return len(self.residency.retired)

    def _retire(self, index: int) -> int:
        self.residency.retire(index)
        slot = self._slots[index]
        slot.wait()
        self.transfer.leave(slot)
        self.slots.remove(slot)
        return slot.decommit()

    def check_integrity(self) -> None:
        """Raises AssertionError if residency, slots and tickets disagree."""
        self.residency.check_integrity()
        used = {id(slot) for at, slot in enumerate(self._slots) if at not in self.residency.retired}
        assert used == {id(slot) for slot in self.slots}, f"{self.name}: residency counts other slots as in use"
        for key, entry in self.entries.items():
            assert entry.slot is self._slots[entry.index], f"{key} is in a slot with another index"
            assert entry.slot.filled, f"{key} is in a slot that was never filled"
            loading = entry.state is EntryState.LOADING
            assert (entry.ticket is not None) == loading, f"{key} is {entry.state.value}, its ticket {entry.ticket}"
            assert entry.error is None, f"{key} failed but has a slot: {entry.error}"
            assert entry.source is None or loading, f"{key} has arrived but still pins its source"
            assert entry.source is None or entry.source.pins, f"{key} is copied from an unpinned entry"
