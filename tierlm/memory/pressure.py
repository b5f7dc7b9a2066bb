"""Whether this machine is short of memory, and what is done about it under a budget that was chosen for it.

Decisions are a pure function of readings, so that they can be tested with readings that are made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tierlm.config import format_size
from tierlm.host import available_ram
from tierlm.memory.tiers import Tier

INTERVAL = 0.5  # seconds between two looks
STALLED = 0.10  # share of the last ten seconds in which something waited for memory, from which on there is too little
SHORT, PLENTY = 0.5, 1.5  # of the reserve: give back below, take again above
STEP = 0.125  # of the slots that are given back, at the least, when something stalls


@dataclass(frozen=True)
class Reading:
    """``available``: bytes that can still be taken; ``stalled``: share of time that something waited for memory."""

    available: int
    stalled: float


def read_pressure() -> Reading:
    """Of this machine, or the memory cgroups around this process; ``stalled`` is 0 where the system does not tell."""
    return Reading(available_ram(), _stalled(Path("/proc/pressure/memory")))


class Pressure:
    """Follows the pressure with a budget. ``reserve``: bytes to leave free for others. ``read`` and ``clock`` are
    replaced in tests."""

    def __init__(
        self,
        reserve: int,
        read: Callable[[], Reading] = read_pressure,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.reserve, self._read, self._clock = reserve, read, clock
        self._next = clock() + INTERVAL

    def change(self, held: int) -> int:
        """Bytes to give back (negative) or that may be taken again, of ``held`` in slots; 0 between two looks."""
        now = self._clock()
        if now < self._next:
            return 0
        self._next = now + INTERVAL
        reading = self._read()
        short = self.reserve - reading.available
        if reading.available < SHORT * self.reserve:
            return -short
        plenty = reading.available > PLENTY * self.reserve
        if reading.stalled > STALLED:  # with plenty, something waits in a cgroup of its own: nothing here would help
            return 0 if plenty else -max(int(held * STEP), short)
        return -short if plenty else 0


class PressureRelief:
    """Shrinks ``tier`` while others need its memory, down to ``least`` slots, and grows it again after."""

    def __init__(self, pressure: Pressure, tier: Tier, least: int):
        self.pressure, self.tier, self.least = pressure, tier, least
        self.shrunk = self.grown = 0  # bytes

    def follow(self) -> None:
        """Look, now and then, and act: between two steps, when nothing is leased."""
        tier = self.tier
        change = self.pressure.change(sum(slot.size for slot in tier.slots if slot.filled))
        if change < 0:
            self.shrunk += tier.shrink(-change, self.least)
        elif change > 0 and tier.retired:
            self.grown += tier.grow(change)

    def notes(self) -> list[str]:
        """What was done, in words."""
        if not self.shrunk:
            return []
        done = f"{format_size(self.shrunk)} of slots were given up, {format_size(self.grown)} taken again"
        return [f"this machine was short of memory: {done}"]


def _stalled(file: Path) -> float:
    """``some avg10`` of a pressure file (Linux, Documentation/accounting/psi.rst), as a share."""
    try:
        fields = file.read_text().split("\n", 1)[0].split()
        return float(dict(field.split("=") for field in fields[1:])["avg10"]) / 100
    except (OSError, ValueError, KeyError):
        return 0.0
