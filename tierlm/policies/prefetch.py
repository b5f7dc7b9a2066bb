"""Which predictions are worth a read. No machine constants: the disk's speed, the layers' times and the predictions'
precision are measured while running."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from tierlm.policies.pace import FAR, NEAR, Pace
from tierlm.spec import ExpertKey

MEMORY = 32  # observations in a running average
RANKS = 32  # predictions of higher rank share one precision


class Average:
    """A running mean over about the last MEMORY values."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.value += (value - self.value) / self.count


class Prefetch(ABC):
    """Decides what is worth a read. Prefill and decode are accounted separately."""

    @abstractmethod
    def due(self, ahead: int, prefill: bool) -> bool:
        """Whether to predict now the layer that is ``ahead`` MoE layers away."""

    @abstractmethod
    def choose(
        self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
    ) -> list[ExpertKey]:
        """The keys of ``absent``, likeliest first, worth reading now. ``backlog``: demands queued on the link."""

    def read(self, seconds: float, cpu: float) -> None:
        """One record took ``seconds`` of the link and ``cpu`` seconds of the processors."""

    def turn(self, layer: int, needed: Collection[ExpertKey]) -> None:
        """``layer`` runs now and demands ``needed``."""

    def layer_done(self, absent: int, compute: float, prefill: bool) -> None:
        """A layer has run: ``absent`` records had to be read, predicted or not; it computed for ``compute`` seconds."""


class Always(Prefetch):
    """Reads every prediction, so that no decision depends on time."""

    def due(self, ahead: int, prefill: bool) -> bool:
        return True

    def choose(
        self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
    ) -> list[ExpertKey]:
        return list(absent)


class Measured(Prefetch):
    """Weighs the expected gain of each prediction of one store.

    Precision is averaged by kind (``ahead``, ``prefill``) and rank among the absent records. Every prediction is
    judged, read or not, so that learning costs no reads. A right prediction saves the part of its read that ends
    before the layer's turn, up to the time the layer would have waited. A wrong one delays demands by the rest of its
    read. Both cost the processor time of a read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._precision: dict[tuple[int, bool, int], Average] = defaultdict(Average)
        self._window: dict[tuple[int, bool], Average] = defaultdict(Average)  # seconds from prediction to turn
        self._absent: dict[bool, Average] = defaultdict(Average)  # records a layer would read without prefetch
        self._compute: dict[bool, Average] = defaultdict(Average)  # seconds of a layer's experts, without waits
        self._open: dict[int, dict[tuple[int, bool], tuple[float, dict[ExpertKey, int]]]] = {}  # by layer
        self.pace = Pace()
        self._began, self._ended = 0.0, 0.0  # of this step's first layer, and of its latest
        self._last, self._decoding = -1, False
        self.read_seconds = Average()  # of the link, for one record
        self.read_cpu = Average()  # of the processors, for one record

    def due(self, ahead: int, prefill: bool) -> bool:
        """Always in a prefill, where a prediction is cheap compared with a layer."""
        return prefill or self.pace.way == FAR or (self.pace.way == NEAR and ahead == 1)

    def choose(
        self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
    ) -> list[ExpertKey]:
        kind, read = (ahead, prefill), self.read_seconds.value
        self._open.setdefault(layer, {})[kind] = (self._clock(), {key: rank for rank, key in enumerate(absent)})
        window = self._window[kind].value
        waits = self._absent[prefill].value * read - self._compute[prefill].value  # of the layer without prefetch
        start, chosen = backlog * read, []
        for rank, key in enumerate(absent):
            head = min(read, window - start)
            if head <= 0 or waits <= 0:
                break
            p = self._precision[(*kind, min(rank, RANKS))].value
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
            self._window[kind].add(now - made)
            for key, rank in ranks.items():
                self._precision[(*kind, min(rank, RANKS))].add(float(key in needed))

    def layer_done(self, absent: int, compute: float, prefill: bool) -> None:
        self._absent[prefill].add(absent)
        self._compute[prefill].add(compute)
        self._ended, self._decoding = self._clock(), not prefill
