"""Which predictions are worth a read: decided from what predictions, reads and layers have cost so far. No constants of
a machine: the disk's speed, the layers' times and the predictions' precision are all measured while running."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

from tierlm.policies.pace import FAR, NEAR, Pace
from tierlm.spec import ExpertKey

MEMORY = 32  # observations over which averages run
RANKS = 32  # predictions further back share one precision


class Average:
    """A running mean: of all values at first, then over about MEMORY of them."""

    def __init__(self, value: float = 0.0):
        self.value, self.count = value, 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.value += (value - self.value) / self.count


class Prefetch(ABC):
    """What is worth a read. Told of each layer's turn and end; ``prefill`` and decode are apart."""

    @abstractmethod
    def due(self, ahead: int, prefill: bool) -> bool:
        """Whether to find out now what a layer ``ahead`` will choose."""

    @abstractmethod
    def choose(
        self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
    ) -> list[ExpertKey]:
        """Those of ``absent``, likeliest first, that are worth reading now. ``backlog``: records that the link has to
        read for demands already."""

    def read(self, seconds: float, cpu: float) -> None:
        """The read of one record took so many seconds of the link, and of the processors."""

    def turn(self, layer: int, needed: Collection[ExpertKey]) -> None:
        """``layer`` runs now and demands ``needed``."""

    def layer_done(self, absent: int, compute: float, prefill: bool) -> None:
        """A layer has run: how many of its records had to be read, predicted or not, and the seconds it computed."""


class Always(Prefetch):
    """Finds every prediction worth a read: no decision depends on time."""

    def due(self, ahead: int, prefill: bool) -> bool:
        return True

    def choose(
        self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
    ) -> list[ExpertKey]:
        return list(absent)


class Measured(Prefetch):
    """The account of one store's predictions.

    A prediction is the ``rank``-th likeliest record of a layer that is absent, made ``ahead`` of the layer: 1 when the
    layer before runs its experts, 0 just before the layer's attention, and so on; prefill and decode apart (``kind``).
    Its precision is judged whether it was read or not, so that nothing need be read to learn it. If it is right, it
    saves the part of its read that fits between now and the layer's turn, as far as the layer would have waited at
    all. If it is wrong, what is left of its read then is in the demands' way. Both cost the processor time of a read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._precision: dict[tuple[int, bool, int], Average] = {}
        self._window: dict[tuple[int, bool], Average] = {}  # seconds from the prediction to the layer's turn
        self._absent: dict[bool, Average] = {}  # records of a layer that would have to be read without prefetch
        self._compute: dict[bool, Average] = {}  # seconds of a layer's expert step apart from waiting
        self._open: dict[int, dict[tuple[int, bool], tuple[float, dict[ExpertKey, int]]]] = {}  # by layer
        self.pace = Pace()
        self._began, self._ended = 0.0, 0.0  # of the running step's first layer, and of the latest
        self._last, self._decoding = -1, False
        self.read_seconds = Average()  # of the link, for one record
        self.read_cpu = Average()  # of the processors, likewise

    def due(self, ahead: int, prefill: bool) -> bool:
        """In a prefill a prediction is cheap beside a layer."""
        return prefill or self.pace.way == FAR or (self.pace.way == NEAR and ahead == 1)

    def choose(
        self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
    ) -> list[ExpertKey]:
        kind, read = (ahead, prefill), self.read_seconds.value
        self._open.setdefault(layer, {})[kind] = (self._clock(), {key: rank for rank, key in enumerate(absent)})
        window = self._window[kind].value if kind in self._window else 0.0
        waits = 0.0  # that the layer would have without prefetch
        if prefill in self._absent:
            waits = self._absent[prefill].value * read - self._compute[prefill].value
        start, chosen = backlog * read, []
        for rank, key in enumerate(absent):
            head = min(read, window - start)
            if head <= 0 or waits <= 0:
                break
            p = self._precision.get((*kind, min(rank, RANKS)), Average()).value
            gain = p * min(head, waits) - (1 - p) * (read - head) - self.read_cpu.value
            if gain > 0:
                chosen.append(key)
                start, waits = start + read, waits - p * read
        return chosen

    def read(self, seconds: float, cpu: float) -> None:
        self.read_seconds.add(seconds)
        self.read_cpu.add(cpu)

    def turn(self, layer: int, needed: Collection[ExpertKey]) -> None:
        now = self._clock()
        if layer <= self._last:  # a step has ended with the layer before
            if self._decoding:
                self.pace.add(self._ended - self._began)
            self._began = now
        self._last = layer
        for kind, (made, ranks) in self._open.pop(layer, {}).items():
            self._average(self._window, kind).add(now - made)
            for key, rank in ranks.items():
                self._average(self._precision, (*kind, min(rank, RANKS))).add(float(key in needed))

    def layer_done(self, absent: int, compute: float, prefill: bool) -> None:
        self._average(self._absent, prefill).add(absent)
        self._average(self._compute, prefill).add(compute)
        self._ended, self._decoding = self._clock(), not prefill

    @staticmethod
    def _average(table: dict, kind: object) -> Average:  # type: ignore[type-arg]
        if kind not in table:
            table[kind] = Average()
        found: Average = table[kind]
        return found
