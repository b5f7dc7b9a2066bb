"""A tier: slots on a device, which records are in them, and from where the missing ones come.

One thread, the one that computes, calls a tier. Transfers run elsewhere; a tier learns of their end when it looks
(``settle``), so that residency is never changed behind the caller's back.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tierlm.errors import StorageError
from tierlm.memory.slots import Entry, Slot
from tierlm.memory.ticket import Job, Priority, Ticket
from tierlm.memory.transfer import Transfer
from tierlm.policies.eviction import Policy
from tierlm.spec import Key, same_layer


class Source(Protocol):
    """Where a tier gets records from: the disk, or the tier below."""

    def fetch(self, key: Key, slot: Slot, priority: Priority, streaming: bool) -> tuple[Ticket, Entry | None] | None:
        """Start bringing ``key`` into ``slot``. Returns the ticket, and the entry below that stays pinned until it
        is done; None if there is no room on the way just now."""

    def settle(self) -> None:
        """Take note of what has arrived."""

    def copied(self, entry: Entry) -> None:
        """The copy out of ``entry`` has ended: unpin it. While the tier above has it too, it is the first to leave."""

    def keep(self, key: Key) -> None:
        """The tier above has let ``key`` go: what is left of it here is worth keeping again."""

    def cancel_stale(self, stale: Callable[[Key], bool], *, begun: bool = True) -> None:
        """Drop the prefetched reads that ``stale`` names; of those that have begun, only if ``begun``."""


@dataclass
class TierStats:
    """Counts of records. A late hit is a demand that found its record on the way; a useful prefetched read was
    demanded afterwards, a wasted one not in the step it was for, a cancelled one was dropped before it began. Records
    that the background brought to free slots are counted as ``warmed`` alone."""

    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    evictions: int = 0
    prefetched: int = 0
    useful: int = 0
    wasted: int = 0
    cancelled: int = 0
    warmed: int = 0


class Tier:
    """Slots and what is in them. ``name`` is "ram" or "vram"; ``size_of`` gives the bytes of a record."""

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
        self.slots = list(slots)
        self.entries: dict[Key, Entry] = {}
        self.stats = TierStats()
        self._free: list[Slot] = []
        for slot in slots:
            self._free_slot(slot)
        self._retired: list[Slot] = []  # whose memory has been given back to the system
        self._loading: dict[Key, Entry] = {}
        self._leaving: dict[Key, None] = {}  # first to go, oldest first: streamed through, guessed wrong, or also above
        self._share_slots()
        self._warming: list[Entry] = []  # brought by the background, the least wanted last
        self._kept: frozenset[Key] = frozenset()
        self._guesses: dict[Key, Entry] = {}  # that nobody has demanded yet
        self._streaming = 0
        self._stream: torch.Stream | None = None  # for copies to the tier above

    def demand(self, key: Key, *, streaming: bool = False) -> Entry | None:
        """The entry of ``key`` for use now, pinned and counted, resident or on its way; None if it must be started.

        ``streaming``: what was streamed through so far still is, and leaves first.
        """
        entry = self.entries.get(key)
        if entry is None:
            return None
        if entry.ticket is None:
            self.stats.hits += 1
        else:
            self.stats.late_hits += 1
            self.transfer.promote(entry.ticket)
        if entry.prefetched:
            self._claim(entry)
            self.stats.useful += 1
        if entry.streaming and not streaming:
            entry.streaming = False
            self._streaming -= 1
        self._leaving.pop(key, None)
        self.policy.on_hit(key)
        entry.pins += 1
        return entry

    def start(self, key: Key, *, priority: Priority = Priority.DEMAND, streaming: bool = False) -> Entry | None:
        """Begin to bring in ``key``, which is absent. A demanded entry comes pinned. None: no slot can be had now.

        ``streaming``: it is streamed through; if it took a warm record's place it leaves first. The background takes
        free slots only, and gives them up for any other use until its read has begun.
        """
        self.settle()
        prefetched = priority is Priority.PREFETCH
        slot, victim, displacing = self._find_slot(key, priority, streaming)
        if slot is None:
            return None
        fetched = self.source.fetch(key, slot, priority, streaming)
        if fetched is None:
            return None
        if victim is None:
            self._free.remove(slot)
        else:
            self._evict(victim)
        slot.filled = True
        entry = Entry(key, slot, fetched[0], prefetched, streaming and displacing, source=fetched[1])
        self.entries[key] = self._loading[key] = entry
        self.policy.on_insert(key, demanded=priority is Priority.DEMAND)
        self._streaming += entry.streaming
        if prefetched:
            self._guesses[key] = entry
            self.stats.prefetched += 1
        elif priority is Priority.WARM_UP:
            self._warming.append(entry)
            self.stats.warmed += 1
        else:
            entry.pins = 1
            self.stats.misses += 1
        return entry

    def protect(self, keys: Iterable[Key]) -> None:
        """Spare ``keys``, as far as others can leave instead, until the next call: they are likely to be used soon."""
        self._kept = frozenset(keys)

    def fetch(self, key: Key, slot: Slot, priority: Priority, streaming: bool) -> tuple[Ticket, Entry] | None:
        """As the source of the tier above: copy ``key`` up, out of a slot of this tier."""
        demanded = priority is Priority.DEMAND
        entry = self.demand(key, streaming=streaming) if demanded else self.entries.get(key)
        if entry is None:
            entry = self.start(key, priority=priority, streaming=streaming)
            if entry is None:
                return None
        if not demanded:
            entry.pins += 1
            if entry.prefetched:  # the tier above keeps account of this guess
                self._claim(entry)
        below, size = entry.slot, self.size_of(key)

        def run() -> None:
            slot.wait()
            self._copy_up(slot.buffer[:size], below.buffer[:size])

        def stalled(what: str) -> StorageError:
            return StorageError(f"copying {key} from {self.name}: {what}")

        job = Job(f"{self.name}->vram", size, run, stalled, str(key))
        return self.transfer.submit([job], priority=priority, after=entry.ticket), entry

    def _copy_up(self, target: Tensor, source: Tensor) -> None:
        """In a transfer thread: copy, on a stream of its own where there are streams, and wait for it."""
        if target.device.type == "cpu":
            target.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.Stream(target.device)
        torch.accelerator.set_stream(self._stream)  # of this thread only
        target.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def settle(self) -> None:
        """Take note of what has arrived, and of what has failed."""
        self.source.settle()
        for key, entry in list(self._loading.items()):
            ticket = entry.ticket
            if ticket is None or not ticket.done:
                continue
            del self._loading[key]
            entry.ticket, entry.error = None, ticket.error
            if entry.source is not None:
                self.source.copied(entry.source)
                entry.source = None
            if ticket.error is not None or ticket.cancelled:
                self._forget(entry)
                self.policy.on_discard(key)
                self._free_slot(entry.slot)

    def unpin(self, entry: Entry) -> None:
        """End a lease. The slot can be given away once the computation queued so far is through."""
        entry.pins -= 1
        entry.slot.release()
        if entry.streaming and self.entries.get(entry.key) is entry:
            self._leaving[entry.key] = None

    def copied(self, entry: Entry) -> None:
        entry.pins -= 1
        if self.entries.get(entry.key) is entry:
            self._leaving[entry.key] = None

    def keep(self, key: Key) -> None:
        entry = self.entries.get(key)
        if entry is not None and not entry.streaming:
            self._leaving.pop(key, None)

    def cancel_stale(self, stale: Callable[[Key], bool], *, begun: bool = True) -> None:
        """Drop the prefetched reads that ``stale`` names. Those that have begun leave first when they end, unless
        ``begun`` is False: then their time has not come yet, and they stay as they are."""
        self.source.cancel_stale(stale, begun=begun)
        for key, entry in list(self._guesses.items()):
            if stale(key):
                if entry.ticket is not None and self.transfer.cancel(entry.ticket):
                    self._claim(entry)
                    self.stats.cancelled += 1
                elif begun:
                    self._claim(entry)
                    self.stats.wasted += 1
                    self._leaving[key] = None
        self.settle()

    def in_flight(self) -> list[Ticket]:
        """What is on its way here, or on the way to here."""
        below = self.source.in_flight() if isinstance(self.source, Tier) else []
        return below + [entry.ticket for entry in self._loading.values() if entry.ticket is not None]

    def shrink(self, nbytes: int, least: int) -> int:
        """Return ``nbytes`` of slots' memory to the system, or as much as there is in slots that nothing holds, and go
        on with the rest of them, ``least`` or more. Returns the bytes. Slots that were never filled free nothing, and
        go first, so that they are not filled now."""
        self.settle()
        freed = 0
        for slot in sorted(self._free, key=lambda free: free.filled):
            if len(self.slots) > least and (freed < nbytes or not slot.filled):
                self._free.remove(slot)
                freed += self._retire(slot)
        for key in list(self.policy.victims()) if freed < nbytes else ():
            if freed >= nbytes or len(self.slots) <= least:
                break
            if self._evictable(key, 0):
                slot = self.entries[key].slot
                self._evict(key)
                freed += self._retire(slot)
        self._share_slots()
        return freed

    def grow(self, nbytes: int) -> int:
        """Use slots again that were given up, of ``nbytes`` at most. Returns the bytes."""
        taken = 0
        while self._retired and taken + self._retired[-1].size <= nbytes:
            slot = self._retired.pop()
            self.slots.append(slot)
            self._free_slot(slot)
            taken += slot.size
        self._share_slots()
        return taken

    @property
    def retired(self) -> int:
        """Slots that have been given up."""
        return len(self._retired)

    def _retire(self, slot: Slot) -> int:
        slot.wait()
        self.slots.remove(slot)
        self._retired.append(slot)
        return slot.give_back()

    def _share_slots(self) -> None:
        self.prefetch_limit = len(self.slots) // 8  # slots that guesses may hold at the expense of warm records
        self._streaming_limit = max(2, len(self.slots) // 8)  # slots that a prefill may, likewise

    def _find_slot(self, key: Key, priority: Priority, streaming: bool) -> tuple[Slot | None, Key | None, bool]:
        """A slot for ``key``, which record has to leave it, and whether a warm one has left or leaves for ``key``."""
        nbytes = self.size_of(key)
        for slot in self._free:
            if slot.size >= nbytes:
                return slot, None, False
        if priority is Priority.WARM_UP:
            return None, None, False
        if (freed := self._stop_warming(nbytes)) is not None:
            return freed, None, False
        prefetched = priority is Priority.PREFETCH
        if prefetched and streaming:  # a prefill's guesses leave half to its demands, which could not go on otherwise
            ahead = sum(entry.streaming for entry in self._guesses.values())
            if ahead >= self._streaming_limit // 2:
                return None, None, False
        for candidate in self._leaving:
            if self._evictable(candidate, nbytes):
                displacing = self.entries[candidate].streaming  # it hands on what it has displaced
                return self.entries[candidate].slot, candidate, displacing
        if prefetched and len(self._guesses) >= self.prefetch_limit:
            return None, None, False
        if streaming and self._streaming >= self._streaming_limit:
            guesses = (entry for entry in self._guesses.values() if entry.streaming and not prefetched)
            found = next((guess for guess in guesses if self._evictable(guess.key, nbytes)), None)
            return (None, None, False) if found is None else (found.slot, found.key, True)
        spared: Key | None = None
        for candidate in self.policy.victims(key):
            # A guess may not take the place of what its own layer may need as much.
            if not self._evictable(candidate, nbytes) or (prefetched and same_layer(candidate, key)):
                continue
            if candidate not in self._kept:
                return self.entries[candidate].slot, candidate, True
            spared = spared or candidate
        if spared is None or prefetched:
            return None, None, False
        return self.entries[spared].slot, spared, True

    def _stop_warming(self, nbytes: int) -> Slot | None:
        """The slot of the least wanted read of the background that has not begun, free again."""
        while self._warming:
            entry = self._warming.pop()
            waits = entry.ticket is not None and entry.ticket.priority is Priority.WARM_UP and not entry.pins
            if waits and entry.slot.size >= nbytes and self.transfer.cancel(entry.ticket):  # type: ignore[arg-type]
                self.stats.warmed -= 1
                self.settle()
                return entry.slot
        return None

    def _evictable(self, key: Key, nbytes: int) -> bool:
        entry = self.entries[key]
        return not entry.pins and entry.ticket is None and entry.slot.size >= nbytes

    def _evict(self, key: Key) -> None:
        self._forget(self.entries[key])
        self.policy.on_evict(key)
        self.source.keep(key)
        self.stats.evictions += 1

    def _forget(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self._leaving.pop(entry.key, None)
        self._streaming -= entry.streaming
        if entry.prefetched:
            self._claim(entry)
            self.stats.wasted += 1

    def _claim(self, entry: Entry) -> None:
        entry.prefetched = False
        del self._guesses[entry.key]

    def _free_slot(self, slot: Slot) -> None:
        bisect.insort(self._free, slot, key=lambda free: free.size)  # the smallest that is large enough is taken
