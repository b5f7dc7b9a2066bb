"""Time waited and bytes read, to charge to a step."""

from __future__ import annotations

from dataclasses import dataclass

from tierlm.memory.store import Store
from tierlm.memory.ticket import DISK
from tierlm.memory.transfer import Transfer
from tierlm.memory.trunks import Trunks


@dataclass(frozen=True, slots=True)
class Usage:
    """Totals: seconds waited for transfers, seconds the disk was busy, bytes read from it."""

    stall: float
    reading: float
    disk_bytes: int

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(self.stall - earlier.stall, self.reading - earlier.reading, self.disk_bytes - earlier.disk_bytes)


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads the totals of one loaded model."""

    store: Store
    trunks: Trunks
    transfer: Transfer

    def read(self) -> Usage:
        disk = self.transfer.busy()[DISK]
        return Usage(self.store.tier.stall + self.trunks.tier.stall, disk.seconds, disk.bytes)
