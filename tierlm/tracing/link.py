"""A simulated link: each read has a latency, all share one bandwidth and wait in two queues."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass

from tierlm.policies.limits import spare_lanes
from tierlm.spec import Key


@dataclass(frozen=True)
class Speed:
    """``bandwidth``: bytes a second over all reads; ``latency``: seconds of each; ``depth``: concurrent reads."""

    bandwidth: float
    latency: float
    depth: int


class Link:
    """Reads of ``nbytes`` each, in ``depth`` lanes. Latencies overlap; bytes queue. Demands go before prefetches, which
    may use only ``spare_lanes``, as in memory/transfer.py. Times are simulated seconds and never go back."""

    def __init__(self, speed: Speed, nbytes: int):
        self.latency, self.seconds = speed.latency, nbytes / speed.bandwidth
        self.done: dict[Key, float] = {}  # end of each read that has begun
        self.begun = 0
        self._queues: tuple[dict[Key, float], dict[Key, float]] = ({}, {})  # demands, prefetches: submission times
        self._lanes = [0.0] * speed.depth
        self._spare_lanes = [0.0] * spare_lanes(speed.depth)
        self._free = 0.0  # when the bytes in flight are done

    def submit(self, key: Key, now: float, prefetch: bool) -> None:
        self._queues[prefetch][key] = now

    def promote(self, key: Key, now: float) -> None:
        """A layer demands a prefetch in flight."""
        if self._queues[True].pop(key, None) is not None:
            self._queues[False][key] = now

    def cancel(self, key: Key, now: float) -> bool:
        """Drop a prefetch. False if it has begun by ``now``."""
        self.run(now)
        return self._queues[True].pop(key, None) is not None

    def backlog(self) -> int:
        """Demands whose reads have not begun."""
        return len(self._queues[False])

    def run(self, until: float) -> None:
        """Begin all reads that can begin by ``until``."""
        demands, prefetches = self._queues
        while (demands or prefetches) and self._begin(until):
            pass

    def arrived(self, now: float) -> dict[Key, float]:
        """Reads that have ended by ``now``, and when; each is reported once."""
        self.run(now)
        there = {}
        for key, at in self.done.items():  # in order of time
            if at > now:
                break
            there[key] = at
        for key in there:
            del self.done[key]
        return there

    def wait(self, keys: Collection[Key]) -> float:
        """When the first of ``keys``, all in flight, arrives."""
        while not (begun := [self.done[key] for key in keys if key in self.done]):
            if not self._begin(math.inf):
                raise RuntimeError(
                    "a simulated layer waits for a record that is not in flight: this is a bug in tierlm"
                )
        return min(begun)

    def next_arrival(self) -> float:
        """When the next read arrives; infinite: none is in flight."""
        while not self.done and self._begin(math.inf):
            pass
        return next(iter(self.done.values()), math.inf)

    def _begin(self, until: float) -> bool:
        """Begin the next read if it can begin by ``until``."""
        demands, prefetches = self._queues
        lane, turn, prefetch = self._lanes[0], math.inf, False
        if demands:
            key = next(iter(demands))
            turn = max(lane, demands[key])
        if prefetches:
            first = next(iter(prefetches))
            at = max(lane, self._spare_lanes[0], prefetches[first])
            if at < turn:
                key, turn, prefetch = first, at, True
        if turn > until or turn == math.inf:
            return False
        del self._queues[prefetch][key]
        self._free = self.done[key] = max(turn + self.latency, self._free) + self.seconds
        self.begun += 1
        heapq.heapreplace(self._lanes, self._free)
        if prefetch:
            heapq.heapreplace(self._spare_lanes, self._free)
        return True
