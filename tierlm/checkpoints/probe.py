"""Measures a disk at its first use: how many reads at a time, and how large, bring out its speed.

Small requests and few of them are worth having: what is demanded waits behind what is already under way.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tierlm.checkpoints.checkpoint import ALIGNMENT, Extent, TensorInfo
from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache, disk_name
from tierlm.checkpoints.reader import MmapReader, Reader, Request, host_memory
from tierlm.config import format_size
from tierlm.errors import StorageError

MIB = 2**20
MIDDLE = 2 * MIB  # the size at which the depth is looked for; then the size, at that depth
# The likeliest first: on a slow disk, or a small model, the time or the bytes run out. Not fewer than 4, nor less than
# 2 MiB: beside a running model, threads wait for the interpreter between two reads, which a probe alone does not see
# (2 reads of 1 MiB have won a probe, and decoded more slowly than 8 of 2 MiB).
DEPTHS = (8, 4, 16)
SIZES = (MIDDLE, 4 * MIB, 8 * MIB)
MAX_UNDER_WAY = 64 * MIB
# Of the best rate. What is under way is in the way of what is demanded next, and more reads at a time take more from
# the arithmetic than such a share of speed brings; samples of the same setting lie 20 % apart on a shared disk.
ENOUGH = 0.75
# Seconds that a request takes of the disk's time, if there are sizes that do: to ask for it takes the interpreter some
# tenths of a millisecond, which the arithmetic beside it lacks.
LASTS = 0.75e-3
ROUNDS = 3  # over all settings, so that what else the disk does falls on all of them
SAMPLE_BYTES, SAMPLE_SECONDS = 32 * MIB, 0.05  # of one setting in one round; whichever ends first
STAGE_BYTES, STAGE_SECONDS = 640 * MIB, 0.6  # of each of the two searches
LATENCY_READS = 5
WORTHWHILE = 512 * MIB  # a smaller model is read before a probe has paid for itself
MEMORY = 32 * MIB  # reads of a probe may land on each other: nobody looks at the bytes


@dataclass(frozen=True, slots=True)
class Measurement:
    """What ``depth`` reads of ``request_bytes`` at a time gave."""

    request_bytes: int
    depth: int
    bytes_per_second: float


def choose(measurements: Sequence[Measurement]) -> Measurement:
    """Of those that reach ENOUGH of the best rate, the one with the fewest bytes under way, then the smallest
    requests; of those whose requests last, or else of the largest."""
    best = max(m.bytes_per_second for m in measurements)
    good = [m for m in measurements if m.bytes_per_second >= ENOUGH * best]
    lasting = min(LASTS * best, max(m.request_bytes for m in good))
    good = [m for m in good if m.request_bytes >= lasting]
    return min(good, key=lambda m: (m.request_bytes * m.depth, m.request_bytes))


def find_profile(reader: Reader, files: Sequence[Path], mode: str, cache: ProfileCache) -> tuple[DiskProfile, str]:
    """The profile of the disk that holds ``files``, and a note that says it in words.

    ``mode``: "auto" probes a disk that the cache does not know, "refresh" any, "off" none. Never raises for what goes
    wrong in a probe: the defaults do for every disk.
    """
    largest = max(files, key=os.path.getsize)
    name = f"disk {disk_name(largest)}"
    big = [file for file in files if os.path.getsize(file) >= max(SIZES)]
    total = sum(map(os.path.getsize, big))
    why_not = None
    if mode == "off":
        why_not = "as asked"
    elif isinstance(reader, MmapReader):
        why_not = "memory-mapped files are read page by page"
    elif total < WORTHWHILE:
        why_not = f"less than {format_size(WORTHWHILE)} in files to read"
    elif mode == "auto" and (known := cache.get(largest)) is not None:
        return known, f"{name}: {known}"
    if why_not is None:
        try:
            profile = probe(reader, big)
        except StorageError as error:
            why_not = str(error)
        else:
            lost = cache.put(largest, profile)
            return profile, f"{name}: {profile}" + (f"; not remembered: {lost}" if lost else "")
    return DiskProfile(), f"{name}: {DiskProfile()}; not probed: {why_not}"


def probe(reader: Reader, files: Sequence[Path]) -> DiskProfile:
    """Measure the disk of ``files``, each of at least max(SIZES) bytes, at random places of them, through ``reader``.

    Takes about a second, and reads at most about twice STAGE_BYTES, nor much more than there is. Raises StorageError.
    """
    with host_memory(MEMORY) as memory, memoryview(memory) as view:
        for page in range(0, MEMORY, ALIGNMENT):  # a page's first touch is not the disk's time
            view[page] = 1
        with ThreadPoolExecutor(max(DEPTHS), "tierlm-probe") as pool:
            return _Probe(reader, files, view, pool).run()


class _Probe:
    """One probe: samples of settings, each a size of requests and a number of them at a time."""

    def __init__(self, reader: Reader, files: Sequence[Path], memory: memoryview, pool: ThreadPoolExecutor):
        self._reader, self._memory, self._pool = reader, memory, pool
        self._sizes = [os.path.getsize(file) for file in files]
        self._wholes = [
            Extent(file, 0, size, 0, (TensorInfo("what the probe looks at", file, 0, size, "U8", (size,)),))
            for file, size in zip(files, self._sizes, strict=True)
        ]
        self._rates: dict[tuple[int, int], list[float]] = {}
        self._bytes = 0

    def run(self) -> DiskProfile:
        self._search([(MIDDLE, depth) for depth in DEPTHS])
        depth = choose(self._measurements()).depth
        self._search([(size, depth) for size in SIZES if size * depth <= MAX_UNDER_WAY])
        found = choose(self._measurements())
        reads = [self._timed(lambda: self._read(found.request_bytes, 0)) for _ in range(LATENCY_READS)]
        return DiskProfile(found.request_bytes, found.depth, found.bytes_per_second, statistics.median(reads))

    def _search(self, settings: Sequence[tuple[int, int]]) -> None:
        """Sample all settings ROUNDS times, as far as the time and the bytes of one stage go."""
        until = time.perf_counter() + STAGE_SECONDS
        limit = self._bytes + min(STAGE_BYTES, sum(self._sizes) // 2)
        for setting in [*settings] * ROUNDS:
            if self._bytes >= limit or time.perf_counter() >= until:
                return
            self._rates.setdefault(setting, []).append(self._sample(*setting))

    def _measurements(self) -> list[Measurement]:
        return [Measurement(*setting, statistics.median(rates)) for setting, rates in self._rates.items()]

    def _sample(self, size: int, depth: int) -> float:
        """Bytes per second of ``depth`` threads that each read ``size`` bytes, again and again."""
        turns = iter(range(max(depth, SAMPLE_BYTES // size)))  # shared: each turn is one thread's
        done: list[int] = []
        until = time.perf_counter() + SAMPLE_SECONDS

        def work(thread: int) -> None:
            for _ in turns:
                self._read(size, thread)
                done.append(size)
                if time.perf_counter() >= until:
                    return

        seconds = self._timed(lambda: list(self._pool.map(work, range(depth))))
        self._bytes += sum(done)
        return sum(done) / seconds

    def _read(self, size: int, thread: int) -> None:
        (whole,) = random.choices(self._wholes, self._sizes)
        lo = random.randrange(0, whole.stop - size + 1) // ALIGNMENT * ALIGNMENT
        at = thread * size % MEMORY
        with self._memory[at : at + size] as part:
            self._reader.read(Request(whole, lo, lo + size), part)

    @staticmethod
    def _timed(action: Callable[[], object]) -> float:
        began = time.perf_counter()
        action()
        return max(time.perf_counter() - began, 1e-9)
