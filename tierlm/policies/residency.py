"""Residency: which records have a slot, which may leave, and which leaves next. Knows keys and sizes only.

The engine's tiers, the simulator and the replay all decide through this class.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Generic, TypeVar

from tierlm.policies.eviction import Policy
from tierlm.policies.limits import prefetch_slots, streaming_slots
from tierlm.spec import ExpertKey, Key, same_layer


class Purpose(IntEnum):
    """Why a record is read, the most urgent first."""

    DEMAND = 0  # a layer waits
    PREFETCH = 1  # a predictor asked for it
    WARM_UP = 2  # a slot was free


class EntryState(Enum):
    LOADING = "loading"
    RESIDENT = "resident"
    GONE = "gone"  # evicted, cancelled or failed; a lease may still refer to the entry


@dataclass(slots=True, eq=False)
class Entry:
    """A record that has a slot.

    ``purpose`` becomes DEMAND with the first demand, or when the prediction has been judged. ``streaming``: it
    displaced a warm record and leaves first. ``pins``: leases, and copies to the tier above.
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
    """A slot for an absent record. ``victim``: the entry that leaves it, if any.

    ``displaces``: the slot was taken from a warm record, now or earlier. ``cancels``: the victim is a warm-up, which
    leaves only if its read has not begun.
    """

    index: int
    victim: E | None = None
    displaces: bool = False
    cancels: bool = False


@dataclass
class TierStats:
    """Counts of records. A late hit finds its record in flight. A useful prefetch is demanded later, a wasted one is
    not demanded in its step, and a cancelled one is dropped before its read begins. Warm-ups count only as
    ``warmed``."""

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

    To read a record, ``find`` a placement and ``admit`` an entry into it. The entry is LOADING until ``arrived``,
    ``discard`` or ``cancel``. ``demand``, and ``admit`` for a demand, pin it until ``release``.
    """

    def __init__(self, policy: Policy, sizes: Sequence[int], size_of: Callable[[Key], int]):
        self.policy, self.sizes, self.size_of = policy, list(sizes), size_of
        self.entries: dict[Key, E] = {}
        self.loading: dict[Key, E] = {}
        self.prefetched: dict[Key, E] = {}  # not demanded or judged yet
        self.leaving: dict[Key, None] = {}  # leave first, oldest first: streamed, wasted, or also above
        self.retired: list[int] = []  # slots out of use, the last retired last
        self.stats = TierStats()
        self.free = sorted(range(len(self.sizes)), key=self.sizes.__getitem__)  # slots, the smallest first
        self._warm_ups: dict[Key, E] = {}  # in flight, the least wanted last
        self._protected: dict[int, frozenset[Key]] = {}  # by layer
        self._streaming = 0  # entries
        self._set_limits()

    @property
    def slots(self) -> int:
        """Slots in use."""
        return len(self.sizes) - len(self.retired)

    # Demand

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
            self.stats.useful += entry.purpose is Purpose.PREFETCH
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
        """A placement for the absent ``key``; None if no slot is available now. Changes no state."""
        nbytes, prefetch = self.size_of(key), purpose == Purpose.PREFETCH
        for index in self.free:
            if self.sizes[index] >= nbytes:
                return Placement(index)
        if purpose == Purpose.WARM_UP:
            return None
        if self._warm_ups and (entry := self._first(reversed(self._warm_ups.values()), nbytes, EntryState.LOADING)):
            return Placement(entry.index, entry, cancels=True)
        if prefetch and streaming and sum(e.streaming for e in self.prefetched.values()) >= self.streaming_limit // 2:
            return None  # the other half is for the prefill's demands
        if self.leaving and (entry := self._first(map(self.entries.__getitem__, self.leaving), nbytes)):
            return Placement(entry.index, entry, displaces=entry.streaming)
        if prefetch and len(self.prefetched) >= self.prefetch_limit:
            return None
        if streaming and self._streaming >= self.streaming_limit:
            own = () if prefetch else (entry for entry in self.prefetched.values() if entry.streaming)
            entry = self._first(own, nbytes)  # a demand of a prefill displaces its own prefetches
        else:
            entry = self._policy_victim(key, nbytes, prefetch)
        return None if entry is None else Placement(entry.index, entry, displaces=True)

    def admit(self, entry: E, placement: Placement[E]) -> None:
        """Give ``entry`` the slot of ``placement`` and evict the victim. An entry for a demand is pinned."""
        if placement.victim is not None:
            self.evict(placement.victim)
        self.free.remove(entry.index)
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
        """``layer`` has run."""
        self.policy.on_turn_end(layer)

    def release(self, entry: E) -> None:
        """End a lease."""
        entry.pins -= 1
        if entry.streaming and entry.state is not EntryState.GONE:
            self.leaving[entry.key] = None

    # Reads

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
        """The read of ``entry``, a prefetch or warm-up, was dropped before it began."""
        if entry.purpose is Purpose.PREFETCH:
            self.stats.cancelled += 1
        else:
            self.stats.warmed -= 1
        self._settle_purpose(entry)
        self.discard(entry)

    def begun(self, entry: E) -> None:
        """The read of ``entry``, a warm-up, has begun: it is no longer a victim."""
        del self._warm_ups[entry.key]

    # Predictions

    def protect(self, layer: int, keys: Collection[Key]) -> None:
        """Evict ``keys`` of ``layer`` only as a last resort, until the next call for ``layer``."""
        if keys:
            self._protected[layer] = frozenset(keys)
        else:
            self._protected.pop(layer, None)

    def stale(self, layer: int, wanted: Collection[Key]) -> list[E]:
        """The prefetches for ``layer`` that are not ``wanted``."""
        found = self.prefetched.items()
        return [e for key, e in found if isinstance(key, ExpertKey) and key.layer == layer and key not in wanted]

    def waste(self, entry: E) -> None:
        """``entry`` was prefetched by a wrong prediction: it leaves first."""
        self._settle_purpose(entry)
        self.stats.wasted += 1
        self.leaving[entry.key] = None

    # The tier above

    def lend(self, entry: E) -> None:
        """Pin ``entry`` for a copy to the tier above, which judges a prefetch instead of this tier."""
        entry.pins += 1
        if entry.purpose is Purpose.PREFETCH:
            self._settle_purpose(entry)

    def copied(self, entry: E) -> None:
        """The copy has ended: the record leaves first here while the tier above has it too."""
        entry.pins -= 1
        if entry.state is not EntryState.GONE:
            self.leaving[entry.key] = None

    def keep(self, key: Key) -> None:
        """The tier above has evicted ``key``: keep the record here, if resident."""
        entry = self.entries.get(key)
        if entry is not None and not entry.streaming:
            self.leaving.pop(key, None)

    # Number of slots

    def warm_ups(self) -> list[E]:
        """The warm-ups in flight that may be cancelled, if their reads have not begun."""
        return [entry for entry in self._warm_ups.values() if not entry.pins]

    def expendable(self) -> list[E]:
        """Entries that may leave now, the policy's first victim first."""
        found = [self.entries[key] for key in self.policy.victims()]
        return [entry for entry in found if self._evictable(entry, 0)]

    def evict(self, entry: E) -> None:
        """Free the slot of ``entry``, which may leave."""
        self._forget(entry)
        self.policy.on_evict(entry.key)
        self.stats.evictions += 1
        self._set_free(entry.index)

    def retire(self, index: int) -> None:
        """Take a free slot out of use."""
        self.free.remove(index)
        self.retired.append(index)
        self._set_limits()

    def restore(self) -> int:
        """Return the last retired slot to use. Returns its index."""
        index = self.retired.pop()
        self._set_free(index)
        self._set_limits()
        return index

    def check_integrity(self) -> None:
        """Raises AssertionError if entries, slots and lists disagree."""
        entries = self.entries.items()
        slots = sorted([*(entry.index for _, entry in entries), *self.free, *self.retired])
        assert slots == list(range(len(self.sizes))), f"slots lost or given twice: {Counter(slots)}"
        sizes = [self.sizes[index] for index in self.free]
        assert sizes == sorted(sizes), f"free slots are not in order of size: {sizes}"
        for key, entry in entries:
            assert entry.key == key, f"{entry.key} is stored under {key}"
            assert entry.state is not EntryState.GONE, f"{key} is gone and has a slot"
            assert entry.pins >= 0, f"{key}: {entry.pins} pins"
            assert self.size_of(key) <= self.sizes[entry.index], f"{key} is larger than its slot"
        loading = {key for key, entry in entries if entry.state is EntryState.LOADING}
        assert set(self.loading) == loading, f"loading: expected {loading}, found {set(self.loading)}"
        prefetched = {key for key, entry in entries if entry.purpose is Purpose.PREFETCH}
        assert set(self.prefetched) == prefetched, f"prefetched: expected {prefetched}, found {set(self.prefetched)}"
        assert set(self._warm_ups) <= {key for key in loading if self.entries[key].purpose is Purpose.WARM_UP}
        assert set(self.leaving) <= set(self.entries), "an absent record is to leave"
        streaming = sum(entry.streaming for entry in self.entries.values())
        assert self._streaming == streaming, f"expected {streaming} streaming, found {self._streaming}"
        assert set(self.policy.victims()) == set(self.entries), "the policy has lost track of the entries"

    # The steps of find

    def _first(self, entries: Iterable[E], nbytes: int, state: EntryState = EntryState.RESIDENT) -> E | None:
        return next((entry for entry in entries if self._evictable(entry, nbytes, state)), None)

    def _policy_victim(self, key: Key, nbytes: int, prefetch: bool) -> E | None:
        """The policy's first victim that may leave and is not protected; for a demand, else the first protected one. A
        prefetch never evicts a record of its own layer, which may need it as much."""
        protected: E | None = None
        for candidate in self.policy.victims(key):
            entry = self.entries[candidate]
            if not self._evictable(entry, nbytes) or (prefetch and same_layer(candidate, key)):
                continue
            if not self._protected or candidate not in self._protected.get(candidate.layer, ()):
                return entry
            protected = protected or entry
        return None if prefetch else protected

    def _evictable(self, entry: E, nbytes: int, state: EntryState = EntryState.RESIDENT) -> bool:
        return not entry.pins and entry.state is state and self.sizes[entry.index] >= nbytes

    # Bookkeeping

    def _forget(self, entry: E) -> None:
        key = entry.key
        del self.entries[key]
        if entry.state is EntryState.LOADING:
            del self.loading[key]
        entry.state = EntryState.GONE
        self.leaving.pop(key, None)
        self._streaming -= entry.streaming
        if entry.purpose is not Purpose.DEMAND:
            self.stats.wasted += entry.purpose is Purpose.PREFETCH
            self._settle_purpose(entry)

    def _settle_purpose(self, entry: E) -> None:
        """Count ``entry`` as demanded from now on."""
        self.prefetched.pop(entry.key, None)
        self._warm_ups.pop(entry.key, None)
        entry.purpose = Purpose.DEMAND

    def _set_free(self, index: int) -> None:
        bisect.insort(self.free, index, key=self.sizes.__getitem__)

    def _set_limits(self) -> None:
        self.prefetch_limit, self.streaming_limit = prefetch_slots(self.slots), streaming_slots(self.slots)
