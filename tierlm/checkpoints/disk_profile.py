"""What a disk can do, and the file in the user's cache folder that remembers it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tierlm.checkpoints.checkpoint import ALIGNMENT
from tierlm.config import format_size
from tierlm.files import write_whole

VERSION = 1  # of the file; one of another version is written anew
MAX_DEPTH = 256
SMALL_DEPTH = 16  # of reads smaller than a disk's own request; more bring little, and each is a thread


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """How a disk is to be read: ``depth`` reads of ``request_bytes`` at a time, the least that brings out its speed.

    ``bytes_per_second``: what it then gives; ``latency``: seconds of one such read alone. None: never measured, and
    then the other two are what suits most disks.
    """

    request_bytes: int = 8 * 2**20
    depth: int = 8
    bytes_per_second: float | None = None
    latency: float | None = None

    def depth_of(self, nbytes: int) -> int:
        """How many reads of ``nbytes`` keep as much under way as ``depth`` requests do, if they are smaller."""
        if self.bytes_per_second is None:
            return self.depth
        return max(self.depth, min(SMALL_DEPTH, self.depth * self.request_bytes // max(nbytes, 1)))

    def __str__(self) -> str:
        speed = "" if self.bytes_per_second is None else f", {self.bytes_per_second / 1e9:.2f} GB/s when probed"
        return f"{self.depth} reads of {format_size(self.request_bytes)} at a time{speed}"


def together(profiles: Sequence[DiskProfile]) -> DiskProfile:
    """The profile of several disks read side by side. Requests are as large as the one that needs the largest."""
    speeds = [p.bytes_per_second for p in profiles if p.bytes_per_second is not None]
    latencies = [p.latency for p in profiles if p.latency is not None]
    return DiskProfile(
        max(p.request_bytes for p in profiles),
        min(sum(p.depth for p in profiles), MAX_DEPTH),
        sum(speeds) if len(speeds) == len(profiles) else None,
        max(latencies) if len(latencies) == len(profiles) else None,
    )


def disk_name(file: Path) -> str:
    """The disk under ``file`` in words: its block device, if there is one, and where it is mounted."""
    number = os.stat(file).st_dev
    mounted = file.resolve()
    while not os.path.ismount(mounted):
        mounted = mounted.parent
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return f"{device.resolve().name} at {mounted}" if device.exists() else str(mounted)


class ProfileCache:
    """Profiles of the disks of this machine. ``folder`` None, or unusable: nothing is remembered, nothing fails."""

    def __init__(self, folder: Path | None):
        self._file = None if folder is None else folder / "disk.json"

    def get(self, file: Path) -> DiskProfile | None:
        """What is remembered of the disk under ``file``; None for nothing, or nothing that makes sense."""
        return _profile(self._disks().get(_key(file)))

    def put(self, file: Path, profile: DiskProfile) -> str | None:
        """Remember the profile of the disk under ``file``. Returns why that was not possible, or None."""
        if self._file is None:
            return "there is no cache folder"
        disks = self._disks() | {_key(file): asdict(profile)}
        try:
            write_whole(self._file, json.dumps({"version": VERSION, "disks": disks}, indent=2))
        except OSError as error:
            return f"{self._file}: {error.strerror or error}"
        return None

    def _disks(self) -> dict[str, Any]:
        """The entries of the file, unchecked; none if it cannot be read, or is not ours."""
        if self._file is None:
            return {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or found.get("version") != VERSION:
            return {}
        disks = found.get("disks")
        return disks if isinstance(disks, dict) else {}


def _key(file: Path) -> str:
    """Numbers of devices repeat on other machines, which may share the cache folder, and change with a restart."""
    number = os.stat(file).st_dev
    return f"{os.uname().nodename} {os.major(number)}:{os.minor(number)} {disk_name(file)}"


def _profile(entry: Any) -> DiskProfile | None:
    if not isinstance(entry, dict):
        return None
    size, depth = entry.get("request_bytes"), entry.get("depth")
    rates = (entry.get("bytes_per_second"), entry.get("latency"))
    if type(size) is not int or size < ALIGNMENT or size % ALIGNMENT or size > 2**30:
        return None
    if type(depth) is not int or not 1 <= depth <= MAX_DEPTH:
        return None
    if not all(isinstance(rate, float) and math.isfinite(rate) and rate > 0 for rate in rates):
        return None
    return DiskProfile(size, depth, *rates)
