"""Assumed routing: how many experts a decode step uses, and how many of them are in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol


class Routing(Protocol):
    """What a decode step of ``batch`` sequences demands of a layer."""

    def used(self, batch: int) -> float:
        """Distinct experts of a layer."""

    def rate(self, share: float, batch: int = 1) -> float:
        """The hit rate of these experts with slots for ``share`` of all."""


@dataclass(frozen=True)
class Uniform:
    """A token uses ``chosen`` of ``experts``, all equally likely: no policy does better on it, and no real model is
    worse."""

    experts: int
    chosen: int

    def used(self, batch: int) -> float:
        return self.experts * (1 - (1 - self.chosen / self.experts) ** batch) if self.experts else 0.0

    def rate(self, share: float, batch: int = 1) -> float:
        return share


@dataclass(frozen=True)
class Skewed:
    """Routing like a trained model's.

    With probability ``stickiness`` a token reuses an expert of the sequence's previous token, else it uses the expert
    of rank r with probability proportional to r ** -skew. Both are at the cautious end of the figures in
    bench/synthetic.py. Sequences choose independently: a step of B sequences uses an expert of chance p with
    probability 1 - (1 - p)^B. The slots hold the most used experts, and others until they are used again if that
    hits more often."""

    experts: int
    chosen: int
    skew: float = 0.5
    stickiness: float = 0.3

    def used(self, batch: int) -> float:
        return sum(_any(chance, batch) for chance in self._chances)

    def rate(self, share: float, batch: int = 1) -> float:
        if not self.experts:
            return 1.0
        return max(self._rate(share, batch, 0.0), self._rate(share, batch, self.stickiness))

    def _rate(self, share: float, batch: int, again: float) -> float:
        """The hit rate if an expert of chance p stays, with the chance ``again`` * p, until it is used again."""
        slots, used = share * self.experts, self.used(batch)
        kept = min(1.0, slots / used)
        waiting = [_any(again * chance, batch) for chance in self._chances]
        room, missed = max(0.0, slots - sum(waiting)), 0.0  # for the most used experts
        for chance, held in zip(self._chances, waiting, strict=True):
            there = 1.0 if room >= 1 - held else room / (1 - held)
            room -= there * (1 - held)
            fresh = _any((1 - again) * chance, batch)
            missed += (1 - there) * fresh + (1 - kept) * (_any(chance, batch) - fresh)
        return max(0.0, 1 - missed / used)

    @cached_property
    def _chances(self) -> list[float]:
        """The probability that a token uses an expert, by rank; at most 1, and ``chosen`` in all."""
        weights = [rank**-self.skew for rank in range(1, self.experts + 1)]
        rest, left, found = sum(weights), float(self.chosen), []
        for weight in weights:
            found.append(min(1.0, left * weight / rest))
            rest, left = rest - weight, left - found[-1]
        return found


def _any(chance: float, batch: int) -> float:
    """The probability that at least one of ``batch`` sequences does what one does with ``chance``."""
    return float(1 - (1 - chance) ** batch)
