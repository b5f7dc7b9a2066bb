"""Whether guessing pays, found by trying."""

from __future__ import annotations

import statistics
from collections import deque

TRIAL = 8  # steps with guesses that are compared with the last as many without
TURN = 3  # one step in so many is done with guesses meanwhile: where they cost something, the trial costs less
CLEAR = 4  # of each are enough where all of one way were faster than all of the other: by chance, 1 of 35 times
MARGIN = 0.02  # by which guessing has to be faster: less may be noise, and reads for nothing take energy
REVISIT = 16  # afterwards, one step in so many at most is done the other way,
REVISIT_COST = 0.01  # or in as many as keep the loss at this share of the time


class Pace:
    """Whether steps go faster with guesses or without: both are tried by turns, and the faster one, by the median of
    the last times, is then used but for a few steps that look whether that is still so.

    What a read costs the computation beside it, in memory bandwidth, processor time and warm records, is in these
    times, and nowhere else.
    """

    def __init__(self) -> None:
        self._times: dict[bool, deque[float]] = {way: deque(maxlen=TRIAL) for way in (True, False)}
        self._settled = False
        self._since = 0  # steps since the last look at the other way
        self.guessing = True

    def add(self, seconds: float) -> None:
        """A step, done the way that ``guessing`` says, took ``seconds``: decide about the next one."""
        self._times[self.guessing].append(seconds)
        self._since += 1
        self._settled = self._settled or self._tried()
        if not self._settled:
            self.guessing = self._since % TURN == 0
            return
        medians = {way: statistics.median(times) for way, times in self._times.items()}
        best = medians[True] <= medians[False] * (1 - MARGIN)
        if self.guessing is not best and seconds < medians[best] * (1 - MARGIN * self.guessing):
            return  # a surprise: look again
        loss = max(0.0, medians[not best] / medians[best] - 1) if medians[best] else 0.0
        look = self._since >= max(REVISIT, loss / REVISIT_COST)
        self._since *= not look
        self.guessing = best is not look

    def _tried(self) -> bool:
        """Whether the trial has told."""
        one, other = self._times.values()
        if min(len(one), len(other)) < CLEAR:
            return False
        return min(len(one), len(other)) == TRIAL or max(one) < min(other) or max(other) < min(one)
