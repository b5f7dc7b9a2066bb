"""What the policies that learn have in common: layers run in a cycle, so when a record may be used next is known, and a
policy need only say how likely it will be."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tierlm.policies.eviction import Policy, Setting
from tierlm.spec import Key

Floats = NDArray[np.float32]
LOSS = 0.7  # of the logarithm of what a use is worth, for each token until it


@dataclass(slots=True)
class Residents:
    """Those of one layer, by index. ``waits``: [experts], by how many tokens each record is put off because its use at
    ``chance``, a time in tokens, is not sure. ``order``: indices, the longest wait last."""

    keys: dict[int, Key] = field(default_factory=dict)
    waits: Floats | None = None
    chance: float = 0.0
    order: list[int] = field(default_factory=list)
    version: int = 0  # of the order


class Forecast(Policy):
    """The record that is worth least leaves: P exp(-``LOSS`` d), where P is the chance that its layer's next turn, d
    tokens ahead, uses it.

    A turn is what one layer demands for one token; it ends when another layer comes, or a record comes again. A
    subclass learns from each turn, and says how likely the records of a layer are. To be unlikely is to be late by
    - log(P) / ``LOSS`` tokens, the record's wait: each layer keeps its residents in order, and the longest waits of all
    layers are in a heap by the time when they end, which does not change while others run: O(log layers) a decision,
    and a sort of one layer's residents a turn.
    """

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.experts = 8  # a power of two above the largest index so far
        self.token = 0  # passes through the layers
        self.layer = -1  # the one that runs, or ran last
        self._used: dict[int, None] = {}  # in this turn
        self._open = False  # this turn has not been learnt yet
        self._looked = False  # what its layer has resident has been put off to its next turn
        self._new: dict[int, None] = {}  # inserted in this turn since, which no order has yet
        self._layers: dict[int, Residents] = {}
        self._ends: list[tuple[float, int, int, int]] = []  # - end of the wait, layer, version, place in its order

    @abstractmethod
    def learn(self, layer: int, used: list[int]) -> None:
        """The turn of ``layer`` has ended, with the indices ``used``: call ``forecast`` for the layers of which more is
        known now, among them ``layer``."""

    def forecast(self, layer: int, chances: Floats) -> None:
        """``chances``: [experts], above 0, of use at the next turn of ``layer``."""
        ahead = (layer - self.layer - 1) % self.setting.layers + 1
        waits = (np.log(chances) / -LOSS).astype(np.float32, copy=False)
        self._sort(layer, waits, self.token + (self.layer + ahead) / self.setting.layers)

    def on_insert(self, key: Key, demanded: bool = True) -> None:
        index = _index(key)
        while index >= self.experts:
            self.experts *= 2
        residents = self._layers.setdefault(key.layer, Residents())
        residents.keys[index] = key
        if demanded:
            self._use(key.layer, index)
            self._new[index] = None
        else:
            self._sort(key.layer, residents.waits, residents.chance)

    def on_hit(self, key: Key) -> None:
        self._use(key.layer, _index(key))

    def on_evict(self, key: Key) -> None:
        del self._layers[key.layer].keys[_index(key)]

    def victims(self, incoming: Key | None = None) -> Iterator[Key]:
        if self._open:
            if incoming is not None and incoming.layer != self.layer:
                self._end_turn()
            elif not self._looked:
                self._looked = True
                self._new.clear()
                late = self.token + 1 + self.layer / self.setting.layers
                self._sort(self.layer, self._layers[self.layer].waits, late)
        key = self._settle(self._ends)
        ends = self._ends.copy() if key is None else None
        while key is not None:
            yield key
            ends = self._ends.copy() if ends is None else ends
            key = self._settle(ends, skip=1)
        if self._new:
            keys = self._layers[self.layer].keys
            yield from [keys[index] for index in self._new if index in keys]

    def _settle(self, ends: list[tuple[float, int, int, int]], skip: int = 0) -> Key | None:
        """The resident at the head of ``ends``, once what is stale, and ``skip`` residents, have been taken off."""
        while ends:
            _, layer, version, place = ends[0]
            residents = self._layers[layer]
            key = residents.keys.get(residents.order[place]) if version == residents.version else None
            if key is not None and not skip:
                return key
            skip -= key is not None
            if version == residents.version and place > 0:
                heapq.heapreplace(ends, self._end(layer, residents, place - 1))
            else:
                heapq.heappop(ends)
        return None

    def _end(self, layer: int, residents: Residents, place: int) -> tuple[float, int, int, int]:
        waits = residents.waits
        wait = 0.0 if waits is None else float(waits[residents.order[place]])
        return -(residents.chance + wait), layer, residents.version, place

    def _sort(self, layer: int, waits: Floats | None, chance: float) -> None:
        residents = self._layers.setdefault(layer, Residents())
        residents.chance = chance
        residents.version += 1
        if waits is None:
            residents.order = list(residents.keys)
        else:
            residents.waits = waits = _widened(waits, self.experts)
            indices = np.fromiter(residents.keys, np.intp, len(residents.keys))
            residents.order = indices[waits[indices].argsort(kind="stable")].tolist()
        if residents.order:
            heapq.heappush(self._ends, self._end(layer, residents, len(residents.order) - 1))
        if len(self._ends) > 4 * len(self._layers) + 64:
            self._ends = [end for end in self._ends if end[2] == self._layers[end[1]].version]
            heapq.heapify(self._ends)

    def _use(self, layer: int, index: int) -> None:
        if layer != self.layer or index in self._used:
            self._end_turn()
            self.token += layer <= self.layer
            self.layer, self._used, self._open = layer, {}, True
        self._used[index] = None

    def _end_turn(self) -> None:
        if self._open:
            self._open = self._looked = False
            self._new.clear()
            self.learn(self.layer, list(self._used))


def _index(key: Key) -> int:
    """Of the record in its layer."""
    return key.expert if len(key) > 1 else 0


def _widened(waits: Floats, experts: int) -> Floats:
    """``waits`` of at least ``experts`` records: those that are new are like the one that waits longest."""
    missing = experts - len(waits)
    return waits if missing <= 0 else np.pad(waits, (0, missing), mode="maximum")
