"""What the policies that learn have in common: layers run in a cycle, so when a record may be used next is known, and a
policy need only say how likely it will be."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tierlm.policies.eviction import Policy, TierInfo
from tierlm.spec import ExpertKey

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]
LOSS = 0.7  # of the logarithm of what a use is worth, for each token until it
LAST = -1.0  # when the wait ends of what is in use: it leaves after all others
ABSENT = -np.inf


class Forecast(Policy):
    """The record that is worth least leaves: P exp(-``LOSS`` d), where P is the chance that its layer's next turn, d
    tokens ahead, uses it.

    A turn is what one layer demands for one token; it ends with ``on_turn_end``, or when another begins. A
    subclass learns from each turn, and says how likely the records of the layer are. To be unlikely is to be late by
    - log(P) / ``LOSS`` tokens, the record's wait. When the waits end does not change while other layers run: it stands
    in one array of all records, of which a turn writes its layer's row and a decision takes the largest, a pass over
    8 bytes a record that numpy does in 2 us for 5,000.
    """

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self.experts = 8  # a power of two above the largest index so far
        self.token = 0  # passes through the layers
        self.layer = -1  # the one that runs, or ran last
        self._used: dict[int, None] = {}  # in this turn
        self._open = False  # this turn has not been learnt yet
        self._current = True  # ``_ends`` shows this turn: worked out when somebody looks
        self._keys: list[dict[int, ExpertKey]] = []  # by layer and index, of the residents
        self._chances: list[float] = []  # by layer, a time in tokens: when the next turn is
        self._waits = np.zeros((0, self.experts), np.float32)  # [layers, experts] tokens; those of absent records too
        self._absent = np.zeros((0, self.experts))  # [layers, experts] 0 for residents, else ABSENT
        self._ends = np.zeros((0, self.experts))  # [layers, experts] when a resident's wait ends; else ABSENT

    @abstractmethod
    def learn(self, layer: int, used: Indices) -> None:
        """The turn of ``layer`` has ended, with the indices ``used``: call ``forecast`` for it."""

    def forecast(self, layer: int, logs: Floats) -> None:
        """``logs``: [experts], at most 0, logarithms of the chances of use at the next turn of ``layer``, which has
        just run."""
        np.multiply(logs, -1 / LOSS, out=self._waits[layer])
        self._put_off(layer)

    def on_insert(self, key: ExpertKey, demanded: bool = True) -> None:
        layer, index = key
        if layer >= len(self._keys) or index >= self.experts:
            self._grow(layer, index)
        if demanded:
            self._use(layer, index)
        self._keys[layer][index] = key
        self._absent[layer, index] = 0
        self._ends[layer, index] = LAST if demanded else self._chances[layer] + self._waits[layer, index]

    def on_hit(self, key: ExpertKey) -> None:
        layer, index = key
        self._use(layer, index)
        if self._current:
            self._ends[layer, index] = LAST

    def on_evict(self, key: ExpertKey) -> None:
        layer, index = key
        del self._keys[layer][index]
        self._absent[layer, index] = self._ends[layer, index] = ABSENT

    def on_turn_end(self, layer: int) -> None:
        if self._open:
            self._open, self._current = False, True
            self.learn(self.layer, np.fromiter(self._used, np.intp, len(self._used)))

    def victims(self, incoming: ExpertKey | None = None) -> Iterator[ExpertKey]:
        if not self._current:
            self._current = True
            self._put_off(self.layer)
            here = self._keys[self.layer]
            self._ends[self.layer, [index for index in self._used if index in here]] = LAST
        ends = self._ends
        while ends.size:
            layer, index = divmod(int(ends.argmax()), self.experts)
            if ends[layer, index] == ABSENT:
                return
            yield self._keys[layer][index]
            ends = self._ends.copy() if ends is self._ends else ends
            ends[layer, index] = ABSENT

    def _put_off(self, layer: int) -> None:
        """What is resident of ``layer``, which runs or has just run, to its next turn."""
        chance = self._chances[layer] = self.token + 1 + layer / self.info.layers
        ends = np.add(self._waits[layer], chance, out=self._ends[layer])
        ends += self._absent[layer]

    def _use(self, layer: int, index: int) -> None:
        if not self._open or layer != self.layer or index in self._used:
            self.on_turn_end(self.layer)
            self.token += layer <= self.layer
            self.layer, self._used, self._open, self._current = layer, {}, True, False
        self._used[index] = None

    def _grow(self, layer: int, index: int) -> None:
        """The arrays hold ``layer`` and ``index``. A new record of a known layer waits as long as its last one."""
        experts, layers = self.experts, max(len(self._keys), layer + 1)
        while index >= self.experts:
            self.experts *= 2
        taller, wider = (0, layers - len(self._keys)), (0, self.experts - experts)
        self._keys += [{} for _ in range(taller[1])]
        self._chances += [0.0] * taller[1]
        self._waits = np.pad(np.pad(self._waits, (taller, (0, 0))), ((0, 0), wider), mode="maximum")
        self._absent = np.pad(self._absent, (taller, wider), constant_values=ABSENT)
        self._ends = np.pad(self._ends, (taller, wider), constant_values=ABSENT)
