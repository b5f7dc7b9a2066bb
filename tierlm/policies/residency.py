"""Residency: which records have a slot, who may leave, and who leaves next. Knows keys and sizes; no bytes, no threads.

The engine's tiers, the simulator and the replay decide through this class.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Generic, TypeVar

from tierlm.policies.eviction import Policy
from tierlm.policies.limits import prefetch_slots, streaming_slots
from tierlm.spec import ExpertKey, Key, same_layer


class Purpose(IntEnum):
    """What a record is brought in for. The most urgent comes first."""

    DEMAND = 0  # a layer waits for it
    PREFETCH = 1  # a predictor asked for it
    WARM_UP = 2  # a slot was free


class EntryState(Enum):
    LOADING = "loading"
    RESIDENT = "resident"
    GONE = "gone"  # evicted, cancelled or failed; a lease may still hold the entry


@dataclass(slots=True, eq=False)
class Entry:
    """A record that has a slot.

    ``purpose``: PREFETCH and WARM_UP end with a demand; PREFETCH also once the prediction has been judged.
    ``streaming``: it took the place of a warm record and does not stay. ``pins``: leases, and copies to the tier above.
    """

    key: Key
    index: int  # of the slot
    purpose: Purpose
    streaming: bool = False
    state: EntryState = EntryState.LOADING
    pins: int = 0


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True)
class Placement(Generic[E]):
    """A slot for an absent record. ``victim``: who leaves it, if anyone.

    ``displaces``: a warm record leaves, or has left before, for the new one. ``cancels``: the victim is a warm-up; it
    leaves only if its read has not begun.
    """

    index: int
    victim: E | None = None
    displaces: bool = False
    cancels: bool = False


@dataclass
class TierStats:
    """Counts of records. A late hit is a demand that finds its record on the way. A useful prefetch is demanded
    afterwards, a wasted one is not in the step it was for, a cancelled one is dropped before its read begins.
    Warm-ups count as ``warmed`` alone."""

    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    evictions: int = 0
    prefetched: int = 0
    useful: int = 0
    wasted: int = 0
    cancelled: int = 0
    warmed: int = 0


class Residency(Generic[E]):
    """One tier's slots of ``sizes`` bytes. ``size_of`` gives the bytes of a record.

    To bring a record in: ``find`` a placement, then ``admit`` an entry into it. The entry is LOADING until ``arrived``,
    ``discard`` or ``cancel``. ``demand`` and a demanded ``admit`` pin it until ``release``.
    """

    def __init__(self, policy: Policy, sizes: Sequence[int], size_of: Callable[[Key], int]):
        self.policy, self.sizes, self.size_of = policy, list(sizes), size_of
        self.entries: dict[Key, E] = {}
        self.loading: dict[Key, E] = {}
        self.prefetched: dict[Key, E] = {}  # neither demanded nor judged yet
        self.leaving: dict[Key, None] = {}  # first to leave, oldest first: streamed, predicted wrongly, or also above
        self.retired: list[int] = []  # slots out of use, the latest last
        self.stats = TierStats()
        self._free = sorted(range(len(self.sizes)), key=self.sizes.__getitem__)  # the smallest that fits is taken
        self._warm_ups: dict[Key, E] = {}  # on their way, the least wanted last
        self._protected: dict[int, frozenset[Key]] = {}  # by layer
        self._streaming = 0  # entries
        self._set_limits()

    @property
    def slots(self) -> int:
        """Slots in use."""
        return len(self.sizes) - len(self.retired)

    @property
    def free(self) -> Sequence[int]:
        return self._free

    # What a layer does

    def demand(self, key: Key, streaming: bool) -> E | None:
        """The entry of ``key``, pinned and counted; None if it is absent."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        if entry.state is EntryState.LOADING:
            self.stats.late_hits += 1
        else:
            self.stats.hits += 1
        if entry.purpose is not Purpose.DEMAND:
            if entry.purpose is Purpose.PREFETCH:
                self.stats.useful += 1
            self._settle_purpose(entry)
        if entry.streaming and not streaming:
            entry.streaming = False
            self._streaming -= 1
        if self.leaving:
            self.leaving.pop(key, None)
        self.policy.on_hit(key)
        entry.pins += 1
        return entry

    def find(self, key: Key, purpose: Purpose, streaming: bool) -> Placement[E] | None:
        """A placement for ``key``, which is absent; None if it can have none now. Changes nothing."""
        nbytes, prefetch = self.size_of(key), purpose == Purpose.PREFETCH
        for index in self._free:
            if self.sizes[index] >= nbytes:
                return Placement(index)
        if purpose == Purpose.WARM_UP:
            return None
        if self._warm_ups and (entry := self._least_wanted_warm_up(nbytes)) is not None:
            return Placement(entry.index, entry, cancels=True)
        if prefetch and streaming and self._streaming_prefetches() >= self.streaming_limit // 2:
            return None  # the other half is for the prefill's demands
        if self.leaving and (entry := self._first_to_leave(nbytes)) is not None:
            return Placement(entry.index, entry, displaces=entry.streaming)
        if prefetch and len(self.prefetched) >= self.prefetch_limit:
            return None
        if streaming and self._streaming >= self.streaming_limit:
            entry = None if prefetch else self._streaming_prefetch(nbytes)
        else:
            entry = self._policy_victim(key, nbytes, prefetch)
        return None if entry is None else Placement(entry.index, entry, displaces=True)

    def admit(self, entry: E, placement: Placement[E]) -> None:
        """Give ``entry`` the slot of ``placement``, whose victim leaves. A demanded entry is pinned."""
        if placement.victim is None:
            self._free.remove(entry.index)
        else:
            self._evict(placement.victim)
        key, purpose = entry.key, entry.purpose
        self.entries[key] = self.loading[key] = entry
        self._streaming += entry.streaming
        if purpose is Purpose.DEMAND:
            entry.pins = 1
            self.stats.misses += 1
        elif purpose is Purpose.PREFETCH:
            self.prefetched[key] = entry
            self.stats.prefetched += 1
        else:
            self._warm_ups[key] = entry
            self.stats.warmed += 1
        self.policy.on_insert(key, demanded=purpose is Purpose.DEMAND)

    def end_turn(self, layer: int) -> None:
        """``layer`` has demanded all that it needs for this step."""
        self.policy.on_turn_end(layer)

    def release(self, entry: E) -> None:
        """End a lease."""
        entry.pins -= 1
        if entry.streaming and entry.state is not EntryState.GONE:
            self.leaving[entry.key] = None

    # What becomes of a read

    def arrived(self, entry: E) -> None:
        del self.loading[entry.key]
        self._warm_ups.pop(entry.key, None)
        entry.state = EntryState.RESIDENT

    def discard(self, entry: E) -> None:
        """The read of ``entry`` has failed."""
        self._forget(entry)
        self.policy.on_discard(entry.key)
        self._set_free(entry.index)

    def cancel(self, entry: E) -> None:
        """The read of ``entry``, a prefetch or a warm-up, was dropped before it began."""
        if entry.purpose is Purpose.PREFETCH:
            self.stats.cancelled += 1
        else:
            self.stats.warmed -= 1
        self._settle_purpose(entry)
        self.discard(entry)

    def begun(self, entry: E) -> None:
        """The read of ``entry``, a warm-up, has begun: it is no longer given up for another."""
        del self._warm_ups[entry.key]

    # What a prediction does

    def protect(self, layer: int, keys: Collection[Key]) -> None:
        """Spare ``keys`` of ``layer`` while others can leave instead, until the next call for ``layer``."""
        if keys:
            self._protected[layer] = frozenset(keys)
        else:
            self._protected.pop(layer, None)

    def stale(self, layer: int, wanted: Collection[Key]) -> list[E]:
        """The prefetches for ``layer`` that are not among ``wanted``."""
        prefetched = ((key, entry) for key, entry in self.prefetched.items() if isinstance(key, ExpertKey))
        return [entry for key, entry in prefetched if key.layer == layer and key not in wanted]

    def waste(self, entry: E) -> None:
        """The prediction of ``entry``, a prefetch, was wrong: it leaves first."""
        self._settle_purpose(entry)
        self.stats.wasted += 1
        self.leaving[entry.key] = None

    # What the tier above does

    def lend(self, entry: E) -> None:
        """Pin ``entry`` for a copy to the tier above, which judges the prefetch if it is one."""
        entry.pins += 1
        if entry.purpose is Purpose.PREFETCH:
            self._settle_purpose(entry)

    def copied(self, entry: E) -> None:
        """The copy has ended. While the tier above has the record too, it leaves first here."""
        entry.pins -= 1
        if entry.state is not EntryState.GONE:
            self.leaving[entry.key] = None

    def keep(self, key: Key) -> None:
        """The tier above has evicted ``key``: what is left of it here is worth keeping again."""
        entry = self.entries.get(key)
        if entry is not None and not entry.streaming:
            self.leaving.pop(key, None)

    # How many slots there are

    def expendable(self) -> list[E]:
        """Those that may leave now, the policy's first victims first."""
        found = [self.entries[key] for key in self.policy.victims()]
        return [entry for entry in found if self._evictable(entry, 0)]

    def evict(self, entry: E) -> None:
        """Free the slot of ``entry``, which may leave."""
        self._evict(entry)
        self._set_free(entry.index)

    def retire(self, index: int) -> None:
        """Take a free slot out of use."""
        self._free.remove(index)
        self.retired.append(index)
        self._set_limits()

    def restore(self) -> int:
        """Put the slot that was retired last into use again. Returns its index."""
        index = self.retired.pop()
        self._set_free(index)
        self._set_limits()
        return index

    def check_integrity(self) -> None:
        """Raises AssertionError if entries, slots and lists contradict each other."""
        held = [entry.index for entry in self.entries.values()]
        slots = sorted([*held, *self._free, *self.retired])
        assert slots == list(range(len(self.sizes))), f"slots lost or given twice: {Counter(slots)}"
        sizes = [self.sizes[index] for index in self._free]
        assert sizes == sorted(sizes), f"free slots are not in order of size: {sizes}"
        for key, entry in self.entries.items():
            assert entry.key == key, f"{entry.key} stands under {key}"
            assert entry.state is not EntryState.GONE, f"{key} is gone and has a slot"
            assert entry.pins >= 0, f"{key}: {entry.pins} pins"
            assert self.size_of(key) <= self.sizes[entry.index], f"{key} is larger than its slot"
        for name, found, expected in self._lists():
            assert set(found) == expected, f"{name}: expected {expected}, found {set(found)}"
        assert set(self._warm_ups) <= {key for key in self.loading if self.entries[key].purpose is Purpose.WARM_UP}
        assert set(self.leaving) <= set(self.entries), "an absent record is to leave"
        streaming = sum(entry.streaming for entry in self.entries.values())
        assert self._streaming == streaming, f"expected {streaming} streaming, found {self._streaming}"
        assert set(self.policy.victims()) == set(self.entries), "the policy has lost track"

    def _lists(self) -> Iterator[tuple[str, Collection[Key], set[Key]]]:
        """Each list of keys with those that belong in it."""
        entries = self.entries.items()
        yield "loading", self.loading, {key for key, entry in entries if entry.state is EntryState.LOADING}
        yield "prefetched", self.prefetched, {key for key, entry in entries if entry.purpose is Purpose.PREFETCH}

    # The steps of find

    def _least_wanted_warm_up(self, nbytes: int) -> E | None:
        """A warm-up whose read may not have begun."""
        waiting = reversed(self._warm_ups.values())
        return next((entry for entry in waiting if not entry.pins and self.sizes[entry.index] >= nbytes), None)

    def _streaming_prefetches(self) -> int:
        return sum(entry.streaming for entry in self.prefetched.values())

    def _first_to_leave(self, nbytes: int) -> E | None:
        entries = map(self.entries.__getitem__, self.leaving)
        return next((entry for entry in entries if self._evictable(entry, nbytes)), None)

    def _streaming_prefetch(self, nbytes: int) -> E | None:
        """A prefill's own prefetch, which its demands may displace."""
        found = (entry for entry in self.prefetched.values() if entry.streaming)
        return next((entry for entry in found if self._evictable(entry, nbytes)), None)

    def _policy_victim(self, key: Key, nbytes: int, prefetch: bool) -> E | None:
        """The policy's first choice that may leave and is not protected. A demand takes a protected one rather than
        none; a prefetch does not, nor a record of its own layer, which may need it as much."""
        protected: E | None = None
        for candidate in self.policy.victims(key):
            entry = self.entries[candidate]
            if not self._evictable(entry, nbytes) or (prefetch and same_layer(candidate, key)):
                continue
            if not self._protected or candidate not in self._protected.get(candidate.layer, ()):
                return entry
            protected = protected or entry
        return None if prefetch else protected

    def _evictable(self, entry: E, nbytes: int) -> bool:
        return not entry.pins and entry.state is EntryState.RESIDENT and self.sizes[entry.index] >= nbytes

    # Bookkeeping

    def _evict(self, entry: E) -> None:
        self._forget(entry)
        self.policy.on_evict(entry.key)
        self.stats.evictions += 1

    def _forget(self, entry: E) -> None:
        key = entry.key
        del self.entries[key]
        if entry.state is EntryState.LOADING:
            del self.loading[key]
        entry.state = EntryState.GONE
        self.leaving.pop(key, None)
        self._streaming -= entry.streaming
        if entry.purpose is not Purpose.DEMAND:
            if entry.purpose is Purpose.PREFETCH:
                self.stats.wasted += 1
            self._settle_purpose(entry)

    def _settle_purpose(self, entry: E) -> None:
        """Nothing more is to be found out about ``entry``: it counts as demanded."""
        self.prefetched.pop(entry.key, None)
        self._warm_ups.pop(entry.key, None)
        entry.purpose = Purpose.DEMAND

    def _set_free(self, index: int) -> None:
        bisect.insort(self._free, index, key=self.sizes.__getitem__)

    def _set_limits(self) -> None:
        self.prefetch_limit, self.streaming_limit = prefetch_slots(self.slots), streaming_slots(self.slots)
