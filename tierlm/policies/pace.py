"""How far prefetch pays, found by trying."""

from __future__ import annotations

import statistics
from collections import deque

NONE, NEAR, FAR = WAYS = range(3)  # no prefetch; of the next layer; of all layers that are looked ahead to
TRIAL = 8  # steps of each way that are compared: the last ones
TURNS = (NONE, NEAR, NONE, FAR)  # of the trial: where prefetch costs something, it costs less
CLEAR = 4  # of each are enough where all of the fastest way were faster than all of the next: by chance, 1 of 35 times
MARGIN = 0.02  # by which prefetch has to be faster: less may be noise, and reads for nothing take energy
REVISIT = 16  # afterwards, one step in so many at most is done another way,
REVISIT_COST = 0.01  # or in as many as keep the loss at this share of the time


class Pace:
    """Which way steps go fastest: all are tried by turns, and the fastest one, by the median of the last times, is then
    used but for a few steps that look whether that is still so.

    What a read costs the computation beside it, in memory bandwidth, processor time and warm records, is in these
    times, and nowhere else.
    """

    def __init__(self) -> None:
        self._times: list[deque[float]] = [deque(maxlen=TRIAL) for _ in WAYS]
        self._settled = False
        self._steps = 0
        self._since = 0  # steps since the last look at another way
        self._looked = NONE  # that one
        self.way = TURNS[0]

    def add(self, seconds: float) -> None:
        """A step, done the way that ``way`` says, took ``seconds``: decide about the next one."""
        self._times[self.way].append(seconds)
        self._steps += 1
        self._since += 1
        self._settled = self._settled or self._tried()
        if not self._settled:
            self.way = TURNS[self._steps % len(TURNS)]
            return
        medians = [statistics.median(times) for times in self._times]
        worth = [medians[NONE] * (1 - MARGIN), *medians[NEAR:]]
        best = worth.index(min(worth))
        if self.way != best and seconds < worth[best]:
            return  # a surprise: look again
        other = next(way for way in (*WAYS, *WAYS)[self._looked + 1 :] if way != best)
        loss = max(0.0, medians[other] / medians[best] - 1) if medians[best] else 0.0
        if self._since >= max(REVISIT, loss / REVISIT_COST):
            self._since, self._looked = 0, other
            self.way = other
        else:
            self.way = best

    def _tried(self) -> bool:
        """Whether the trial has told."""
        if min(map(len, self._times)) < CLEAR:
            return False
        if min(map(len, self._times)) == TRIAL:
            return True
        first, second = sorted(self._times, key=statistics.median)[:2]
        return max(first) < min(second)
