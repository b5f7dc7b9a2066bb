"""Measures how far ahead prefetch pays."""

from __future__ import annotations

import statistics
from collections import deque

NONE, NEAR, FAR = WAYS = range(3)  # prefetch nothing; the next layer; every layer in the lookahead
TRIAL = 8  # latest steps of each way that are compared
TURNS = (NONE, NEAR, NONE, FAR)  # of the trial; half without prefetch, which limits its cost
CLEAR = 4  # of each suffice if the fastest way beat the next in all: by chance 1 in 35
MARGIN = 0.02  # by which prefetch must be faster: less may be noise, and useless reads take energy
REVISIT = 16  # later, at most one step in so many tries another way,
REVISIT_COST = 0.01  # and fewer where the loss would exceed this share of the time


class Pace:
    """Chooses the fastest way to prefetch. A trial alternates all ways; then the way with the lowest median time is
    used, and a few steps recheck the others. These step times alone show what a read costs the computation beside it:
    memory bandwidth, processor time and warm records."""

    def __init__(self) -> None:
        self._times: list[deque[float]] = [deque(maxlen=TRIAL) for _ in WAYS]
        self._settled = False
        self._steps = 0
        self._since = 0  # steps since another way was last tried
        self._rechecked = NONE  # the way tried last
        self.way = TURNS[0]

    def add(self, seconds: float) -> None:
        """Record that a step of ``way`` took ``seconds``, and choose the way of the next step."""
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
            return  # a surprise: repeat it
        other = next(way for way in (*WAYS, *WAYS)[self._rechecked + 1 :] if way != best)
        loss = max(0.0, medians[other] / medians[best] - 1) if medians[best] else 0.0
        if self._since >= max(REVISIT, loss / REVISIT_COST):
            self._since, self._rechecked = 0, other
            self.way = other
        else:
            self.way = best

    def _tried(self) -> bool:
        """Whether the trial is decided."""
        if min(map(len, self._times)) < CLEAR:
            return False
        if min(map(len, self._times)) == TRIAL:
            return True
        first, second = sorted(self._times, key=statistics.median)[:2]
        return max(first) < min(second)
