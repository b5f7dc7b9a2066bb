"""Memory pressure on the host, and the response to it under an automatic budget.

Decisions depend only on readings, so tests can supply their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tierlm.config import format_size
from tierlm.host import available_ram
from tierlm.memory.tiers import Tier

log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between two readings
STALLED = 0.10  # memory is short if tasks waited for it for more than this share of the last 10 s
SHORT, PLENTY = 0.5, 1.5  # of the reserve: shrink below, grow above
STEP = 0.125  # share of the slots to shrink by, at least, on a stall


@dataclass(frozen=True)
class Reading:
    """``available``: bytes still free to take; ``stalled``: share of time with a task stalled on memory."""

    available: int
    stalled: float


def read_pressure() -> Reading:
    """A reading of this machine and this process's memory cgroups; ``stalled`` is 0 where the system has no PSI."""
    return Reading(available_ram(), _stalled(Path("/proc/pressure/memory")))


class Pressure:
    """Turns readings into changes of the budget. ``reserve``: bytes to leave free for other processes."""

    def __init__(
        self,
        reserve: int,
        read: Callable[[], Reading] = read_pressure,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.reserve, self._read, self._clock = reserve, read, clock
        self._next = clock() + INTERVAL

    def change(self, held: int) -> int:
        """Bytes to shrink (negative) or grow by, given ``held`` bytes in slots; 0 between two readings."""
        now = self._clock()
        if now < self._next:
            return 0
        self._next = now + INTERVAL
        reading = self._read()
        short = self.reserve - reading.available
        if reading.available < SHORT * self.reserve:
            return -short
        plenty = reading.available > PLENTY * self.reserve
        if reading.stalled > STALLED:  # with plenty free, the stall is in another cgroup: shrinking would not help
            return 0 if plenty else -max(int(held * STEP), short)
        return -short if plenty else 0


class PressureRelief:
    """Shrinks ``tier`` under memory pressure, to ``least`` slots at the lowest, and grows it again afterwards."""

    def __init__(self, pressure: Pressure, tier: Tier, least: int):
        self.pressure, self.tier, self.least = pressure, tier, least
        self.shrunk = self.grown = 0  # bytes

    def follow(self) -> None:
        """Adapt ``tier`` to the pressure. Call between steps, when nothing is leased, and while there are none."""
        tier = self.tier
        change = self.pressure.change(sum(slot.size for slot in tier.slots if slot.filled))
        if change < 0:
            self.shrunk += (freed := tier.shrink(-change, self.least))
            log.info("memory is short: slots shrink by %s", format_size(freed))
        elif change > 0 and tier.retired:
            self.grown += (taken := tier.grow(change))
            log.info("memory is free again: slots grow by %s", format_size(taken))

    def notes(self) -> list[str]:
        """A sentence for ``Stats.notes``, if the tier was shrunk."""
        if not self.shrunk:
            return []
        shrunk, grown = format_size(self.shrunk), format_size(self.grown)
        return [f"this machine was short of memory: slots shrank by {shrunk} and grew again by {grown}"]


def _stalled(file: Path) -> float:
    """``some avg10`` of a PSI file, as a share (Linux, Documentation/accounting/psi.rst)."""
    try:
        fields = file.read_text().split("\n", 1)[0].split()
        return float(dict(field.split("=") for field in fields[1:])["avg10"]) / 100
    except (OSError, ValueError, KeyError):
        return 0.0
