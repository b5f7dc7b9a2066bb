"""The base of the learning policies: layers run in a cycle, so the time of a record's next possible use is known, and a
policy only estimates its probability."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tierlm.policies.eviction import Policy, TierInfo
from tierlm.spec import ExpertKey

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]
LOSS = 0.7  # by which the logarithm of the worth of a use falls with each token until it
LAST = -1.0  # end of the wait of a record in use: it leaves last
ABSENT = -np.inf


class Forecast(Policy):
    """The victim is worth least: P exp(-``LOSS`` d), where P is the probability that its layer's next turn, d tokens
    ahead, uses it.

    A turn is the demands of one layer for one token; it ends with ``on_turn_end`` or when another begins. A subclass
    learns from each turn and forecasts the use of the layer's records. A record of probability P counts as
    -log(P) / ``LOSS`` tokens late: its wait. The ends of waits do not change while other layers run, so one array holds
    them: a turn writes its layer's row, and a decision takes the maximum (8 bytes a record; 2 us for 5,000 in numpy).
    """

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self.experts = 8  # a power of two above the largest index seen
        self.token = 0  # passes through the layers
        self.layer = -1  # that runs, or ran last
        self._used: dict[int, None] = {}  # in this turn
        self._open = False  # this turn is not learnt yet
        self._current = True  # ``_ends`` includes this turn; updated lazily by ``victims``
        self._keys: list[dict[int, ExpertKey]] = []  # by layer and index, of residents
        self._chances: list[float] = []  # by layer: time of the next turn, in tokens
        self._waits = np.zeros((0, self.experts), np.float32)  # [layers, experts] tokens; of absent records too
        self._absent = np.zeros((0, self.experts))  # [layers, experts] 0: resident, else ABSENT
        self._ends = np.zeros((0, self.experts))  # [layers, experts] end of a resident's wait, else ABSENT

    @abstractmethod
    def learn(self, layer: int, used: Indices) -> None:
        """Learn from the ended turn of ``layer``, which used the indices ``used``; then call ``forecast``."""

    def forecast(self, layer: int, logs: Floats) -> None:
        """``logs``: [experts] <= 0, log probabilities of use at the next turn of ``layer``, which has just run."""
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
        """Set the waits of the residents of ``layer``, which runs or has just run, to its next turn."""
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
        """Extend the arrays to ``layer`` and ``index``. A new record of a known layer takes the longest wait in it."""
        experts, layers = self.experts, max(len(self._keys), layer + 1)
        while index >= self.experts:
            self.experts *= 2
        taller, wider = (0, layers - len(self._keys)), (0, self.experts - experts)
        self._keys += [{} for _ in range(taller[1])]
        self._chances += [0.0] * taller[1]
        self._waits = np.pad(np.pad(self._waits, (taller, (0, 0))), ((0, 0), wider), mode="maximum")
        self._absent = np.pad(self._absent, (taller, wider), constant_values=ABSENT)
        self._ends = np.pad(self._ends, (taller, wider), constant_values=ABSENT)
