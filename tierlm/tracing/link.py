"""A link of a simulated machine: reads that take a latency each, share one bandwidth, and wait in two queues."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass

from tierlm.spec import ExpertKey


@dataclass(frozen=True)
class Speed:
    """``bandwidth`` in bytes a second over all reads, ``latency`` in seconds of each, ``depth`` reads at a time."""

    bandwidth: float
    latency: float
    depth: int


class Link:
    """Reads of ``nbytes`` each. A read has one of ``depth`` lanes; its latency passes beside other reads, its bytes
    behind theirs. Demands go ahead of guesses, which get a quarter of the lanes, or two, as in memory/transfer.py.

    Times are seconds of the simulation, and never go back.
    """

    def __init__(self, speed: Speed, nbytes: int):
        self.latency, self.seconds = speed.latency, nbytes / speed.bandwidth
        self.done: dict[ExpertKey, float] = {}  # of the reads that have begun: when they end
        self.begun = 0
        self._queues: tuple[dict[ExpertKey, float], dict[ExpertKey, float]] = ({}, {})  # demands, guesses: since when
        self._lanes = [0.0] * speed.depth
        self._guess_lanes = [0.0] * min(speed.depth, max(2, speed.depth // 4))
        self._free = 0.0  # when the bytes that are under way are through

    def submit(self, key: ExpertKey, now: float, guess: bool) -> None:
        self._queues[guess][key] = now

    def promote(self, key: ExpertKey, now: float) -> None:
        """A guess on its way is demanded."""
        if self._queues[True].pop(key, None) is not None:
            self._queues[False][key] = now

    def cancel(self, key: ExpertKey) -> bool:
        """Drop a guess. False if it has begun."""
        return self._queues[True].pop(key, None) is not None

    def backlog(self) -> int:
        """Demands that have not begun."""
        return len(self._queues[False])

    def run(self, until: float) -> None:
        """Begin all reads whose turn comes by ``until``."""
        demands, guesses = self._queues
        while (demands or guesses) and self._begin(until):
            pass

    def arrived(self, now: float) -> list[ExpertKey]:
        """Those that have come by ``now``, each told once."""
        self.run(now)
        there = []
        for key, at in self.done.items():  # one behind the other, as their bytes go
            if at > now:
                break
            there.append(key)
        for key in there:
            del self.done[key]
        return there

    def wait(self, keys: Collection[ExpertKey]) -> float:
        """The time at which the first of ``keys``, which are on their way, is there."""
        while not (begun := [self.done[key] for key in keys if key in self.done]):
            if not self._begin(math.inf):
                raise RuntimeError("a simulated layer waits for what is not on its way: a bug of tierlm")
        return min(begun)

    def _begin(self, until: float) -> bool:
        """Begin the next read, if its turn comes by ``until``."""
        demands, guesses = self._queues
        lane, turn, guessed = self._lanes[0], math.inf, False
        if demands:
            key = next(iter(demands))
            turn = max(lane, demands[key])
        if guesses:
            guess = next(iter(guesses))
            at = max(lane, self._guess_lanes[0], guesses[guess])
            if at < turn:
                key, turn, guessed = guess, at, True
        if turn > until or turn == math.inf:
            return False
        del self._queues[guessed][key]
        self._free = self.done[key] = max(turn + self.latency, self._free) + self.seconds
        self.begun += 1
        heapq.heapreplace(self._lanes, self._free)
        if guessed:
            heapq.heapreplace(self._guess_lanes, self._free)
        return True
