"""How to read a disk, and the file in the user's cache folder that remembers it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tierlm.checkpoints.record import ALIGNMENT
from tierlm.config import format_size
from tierlm.files import read_regular, write_whole

VERSION = 1  # of the cache file; a file of another version is replaced
MAX_DEPTH = 256
SMALL_DEPTH = 16  # limit for reads smaller than ``request_bytes``: more gain little, and each is a thread


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """How to read a disk: ``depth`` concurrent reads of ``request_bytes``, the least that reaches its speed.

    ``bytes_per_second``: the rate measured so; ``latency``: seconds of a single such read. None: not measured, so
    ``request_bytes`` and ``depth`` are defaults that suit most disks.
    """

    request_bytes: int = 8 * 2**20
    depth: int = 8
    bytes_per_second: float | None = None
    latency: float | None = None

    def depth_of(self, nbytes: int) -> int:
        """Concurrent reads of ``nbytes`` that keep as many bytes in flight as ``depth`` full requests."""
        if self.bytes_per_second is None:
            return self.depth
        return max(self.depth, min(SMALL_DEPTH, self.depth * self.request_bytes // max(nbytes, 1)))

    def __str__(self) -> str:
        speed = "" if self.bytes_per_second is None else f", {self.bytes_per_second / 1e9:.2f} GB/s when probed"
        return f"{self.depth} reads of {format_size(self.request_bytes)} at a time{speed}"


def together(profiles: Sequence[DiskProfile]) -> DiskProfile:
    """The profile of several disks read in parallel, with the largest request of all."""
    speeds = [p.bytes_per_second for p in profiles if p.bytes_per_second is not None]
    latencies = [p.latency for p in profiles if p.latency is not None]
    return DiskProfile(
        max(p.request_bytes for p in profiles),
        min(sum(p.depth for p in profiles), MAX_DEPTH),
        sum(speeds) if len(speeds) == len(profiles) else None,
        max(latencies) if len(latencies) == len(profiles) else None,
    )


def disk_name(file: Path) -> str:
    """The disk under ``file`` in words: block device, if any, and mount point."""
    number = os.stat(file).st_dev
    mounted = file.resolve()
    while not os.path.ismount(mounted):
        mounted = mounted.parent
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return f"{device.resolve().name} at {mounted}" if device.exists() else str(mounted)


class ProfileCache:
    """Profiles of this machine's disks. If ``folder`` is None or unusable, nothing is remembered and nothing fails."""

    def __init__(self, folder: Path | None):
        self._file = None if folder is None else folder / "disk.json"

    def get(self, file: Path) -> DiskProfile | None:
        """The remembered profile of the disk under ``file``; None if absent or invalid."""
        return self._disks().get(_key(file))

    def put(self, file: Path, profile: DiskProfile) -> str | None:
        """Remember the profile of the disk under ``file``. Returns the reason if that fails, else None."""
        if self._file is None:
            return "there is no cache folder"
        disks = {key: asdict(known) for key, known in (self._disks() | {_key(file): profile}).items()}
        try:
            write_whole(self._file, json.dumps({"version": VERSION, "disks": disks}, indent=2))
        except OSError as error:
            return f"{self._file}: {error.strerror or error}"
        return None

    def _disks(self) -> dict[str, DiskProfile]:
        """The valid entries of the file; none if it cannot be read or has another version."""
        if self._file is None:
            return {}
        try:
            found = json.loads(read_regular(self._file))
        except (OSError, ValueError, RecursionError):
            return {}
        disks = found.get("disks") if isinstance(found, dict) and found.get("version") == VERSION else None
        profiles = {key: _profile(entry) for key, entry in disks.items()} if isinstance(disks, dict) else {}
        return {key: profile for key, profile in profiles.items() if profile is not None}


def _key(file: Path) -> str:
    """Host, device number and disk name: machines may share the cache folder, and numbers change at a reboot."""
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
