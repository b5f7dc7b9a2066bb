"""A tier: slots on a device, and the transfers that fill them. Who gets a slot is decided in policies/residency.py.

One thread, the one that computes, calls a tier. Transfers run elsewhere; a tier learns of their end when it looks
(``settle``), so that residency is never changed behind the caller's back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

from tierlm.memory.jobs import CopyUp
from tierlm.memory.slots import Entry, Slot
from tierlm.memory.ticket import Priority, Ticket
from tierlm.memory.transfer import Transfer
from tierlm.policies.eviction import Policy
from tierlm.policies.residency import EntryState, Placement, Purpose, Residency
from tierlm.spec import Key
from tierlm.timeline import span


class Source(Protocol):
    """Where a tier gets records from: the disk, or the tier below."""

    def fetch(self, key: Key, slot: Slot, priority: Priority, streaming: bool) -> tuple[Ticket, Entry | None] | None:
        """Start to bring ``key`` into ``slot``. Returns the ticket, and the entry below that stays pinned until it is
        done; None if there is no room on the way now."""

    def settle(self) -> None:
        """Take note of what has arrived."""

    def copied(self, entry: Entry) -> None:
        """The copy out of ``entry`` has ended."""

    def keep(self, key: Key) -> None:
        """The tier above has evicted ``key``."""

    def cancel_stale(self, layer: int, wanted: Collection[Key], *, begun: bool = True) -> None:
        """Drop the prefetches for ``layer`` that are not ``wanted``; of those that have begun, only if ``begun``."""

    def end_turn(self, layer: int) -> None:
        """``layer`` has demanded all that it needs for this step."""

    def warm(self, keys: Sequence[Key], shares: Mapping[Key, float]) -> None:
        """Fill free slots with ``keys``, the most wanted first; what is left goes to the source. ``shares``: of the
        tokens that used each record in earlier runs, for policies."""

    def in_flight(self) -> list[Ticket]:
        """What is on its way here, or on the way to here."""


class Tier:
    """Slots and what is in them. ``name`` is "ram" or "vram"; ``size_of`` gives the bytes of a record. ``stall``:
    seconds waited for transfers."""

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
        self.slots = list(slots)  # those in use
        self.stall = 0.0
        self._slots = tuple(slots)  # by index, retired ones too
        devices = {slot.buffer.device for slot in slots if slot.buffer.device.type != "cpu"}
        streams = {device: torch.Stream(device) for device in devices}
        for slot in slots:
            slot.stream = streams.get(slot.buffer.device)

    def demand(self, key: Key, *, streaming: bool = False) -> Entry | None:
        """The entry of ``key`` for use now, pinned and counted, resident or on its way; None if it must be started.

        ``streaming``: a record that was streamed still is, and leaves first.
        """
        entry = self.residency.demand(key, streaming)
        if entry is not None and entry.ticket is not None:
            self.transfer.promote(entry.ticket)
        return entry

    def start(self, key: Key, *, priority: Priority = Priority.DEMAND, streaming: bool = False) -> Entry | None:
        """Begin to bring in ``key``, which is absent. A demanded entry comes pinned. None: no slot can be had now.

        ``streaming``: a record that takes a warm record's place leaves first. A warm-up takes free slots only, and
        gives them up for any other use until its read has begun.
        """
        self.settle()
        purpose = Purpose(priority)
        placement = self._find(key, purpose, streaming)
        if placement is None:
            return None
        index, victim = placement.index, placement.victim
        slot = self._slots[index]
        fetched = self.source.fetch(key, slot, priority, streaming)
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
        """A placement; a warm-up that is in its way is cancelled if its read has not begun."""
        while True:
            placement = self.residency.find(key, purpose, streaming)
            if placement is None or not placement.cancels:
                return placement
            assert placement.victim is not None
            if not self._cancel(placement.victim):
                self.residency.begun(placement.victim)

    def _cancel(self, entry: Entry) -> bool:
        """Drop the read of ``entry``. False if it has begun."""
        if entry.ticket is None or not self.transfer.cancel(entry.ticket):
            return False
        self._end_transfer(entry)
        self.residency.cancel(entry)
        return True

    def protect(self, layer: int, keys: Collection[Key]) -> None:
        """Spare ``keys`` of ``layer`` while others can leave instead, until the next call for ``layer``."""
        self.residency.protect(layer, keys)

    def end_turn(self, layer: int) -> None:
        self.residency.end_turn(layer)
        self.source.end_turn(layer)

    def fetch(self, key: Key, slot: Slot, priority: Priority, streaming: bool) -> tuple[Ticket, Entry] | None:
        """As the source of the tier above: copy ``key`` up, out of a slot of this tier."""
        demanded = priority is Priority.DEMAND
        entry = self.demand(key, streaming=streaming) if demanded else self.entries.get(key)
        if entry is None:
            entry = self.start(key, priority=priority, streaming=streaming)
            if entry is None:
                return None
        if not demanded:
            self.residency.lend(entry)
        copy = CopyUp(f"{self.name}->vram", self.size_of(key), str(key), entry.slot, slot)
        return self.transfer.submit([copy], priority=priority, after=entry.ticket), entry

    def settle(self) -> None:
        """Take note of what has arrived, and of what has failed."""
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
        """End a lease. The slot can be given away once the computation queued so far has ended."""
        entry.slot.release()
        self.residency.release(entry)

    def copied(self, entry: Entry) -> None:
        self.residency.copied(entry)

    def keep(self, key: Key) -> None:
        self.residency.keep(key)

    def cancel_stale(self, layer: int, wanted: Collection[Key], *, begun: bool = True) -> None:
        """Drop the prefetches for ``layer`` that are not ``wanted``. Those that have begun leave first when they end;
        unless ``begun``, their time has not come yet, and they stay as they are."""
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
            if key not in self.entries and self.start(key, priority=Priority.WARM_UP) is None:
                return self.source.warm(keys[at:], shares)
        return self.source.warm((), shares)

    def in_flight(self) -> list[Ticket]:
        here = [entry.ticket for entry in self.residency.loading.values() if entry.ticket is not None]
        return self.source.in_flight() + here

    def wait(self, entries: Sequence[Entry], timeout: float) -> None:
        """Wait until one of ``entries`` has arrived, or failed; of none, until anything has. Raises the stalled read's
        error after ``timeout`` seconds."""
        tickets = [entry.ticket for entry in entries if entry.ticket is not None]
        if len(tickets) < len(entries):
            return
        tickets = tickets or self.in_flight()
        if not tickets:
            raise RuntimeError(f"{self.name}: no slot is free and nothing is on its way: this is a bug in tierlm")
        began = time.perf_counter()
        try:
            with span(self.transfer.timeline, "wait", self.name):
                self.transfer.wait_any(tickets, timeout)
        finally:
            self.stall += time.perf_counter() - began
        self.settle()

    def shrink(self, nbytes: int, least: int) -> int:
        """Return ``nbytes`` of slots' memory to the system, or as much as there is in slots that nothing holds, and go
        on with the rest of them, ``least`` or more. Returns the bytes. Slots that were never filled free nothing, and
        go first, so that they are not filled now."""
        self.settle()
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
        """Use retired slots again, of ``nbytes`` at most. Returns the bytes."""
        taken, retired = 0, self.residency.retired
        while retired and taken + self._slots[retired[-1]].size <= nbytes:
            slot = self._slots[self.residency.restore()]
            self.slots.append(slot)
            taken += slot.size
        return taken

    @property
    def retired(self) -> int:
        """Slots whose memory has gone back to the system."""
        return len(self.residency.retired)

    def _retire(self, index: int) -> int:
        self.residency.retire(index)
        slot = self._slots[index]
        slot.wait()
        self.slots.remove(slot)
        return slot.give_back()

    def check_integrity(self) -> None:
        """Raises AssertionError if residency, slots and tickets contradict each other."""
        self.residency.check_integrity()
        used = {id(slot) for at, slot in enumerate(self._slots) if at not in self.residency.retired}
        assert used == {id(slot) for slot in self.slots}, f"{self.name}: another set of slots is in use"
        for key, entry in self.entries.items():
            assert entry.slot is self._slots[entry.index], f"{key} is in a slot of another index"
            assert entry.slot.filled, f"{key} is in a slot that was never filled"
            loading = entry.state is EntryState.LOADING
            assert (entry.ticket is not None) == loading, f"{key} is {entry.state.value}, its ticket {entry.ticket}"
            assert entry.error is None, f"{key} failed and has a slot: {entry.error}"
            assert entry.source is None or loading, f"{key} has arrived and still pins its source"
            assert entry.source is None or entry.source.pins, f"{key} is copied from an entry without a pin"
