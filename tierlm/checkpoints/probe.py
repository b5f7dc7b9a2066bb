"""Measures a disk at its first use: the request size and the number of concurrent reads that reach its speed.

Few and small requests are better: a demand read waits for the requests already in flight.
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

from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache, disk_name
from tierlm.checkpoints.reader import MmapReader, Reader, Request, host_memory
from tierlm.checkpoints.record import ALIGNMENT, Extent, TensorInfo
from tierlm.config import format_size
from tierlm.errors import StorageError

MIB = 2**20
MIDDLE = 2 * MIB  # the depth is searched at this size, then the size at that depth
# Likeliest first: on a slow disk or a small model, time or bytes run out. At least 4 reads and 2 MiB: beside a running
# model, threads wait for the interpreter between reads, which a probe alone does not see (2 reads of 1 MiB won a probe
# and decoded more slowly than 8 of 2 MiB).
DEPTHS = (8, 4, 16)
SIZES = (MIDDLE, 4 * MIB, 8 * MIB)
MAX_IN_FLIGHT = 64 * MIB
# Share of the best rate that is good enough. Requests in flight delay the next demand, and more concurrent reads cost
# the arithmetic more than the rest of the rate gains. Samples of one setting differ by 20 % on a shared disk.
ENOUGH = 0.75
# Seconds of the disk's time that a request should last, if any size does: issuing one takes the interpreter some tenths
# of a millisecond, which the arithmetic beside it loses.
LASTS = 0.75e-3
ROUNDS = 3  # over all settings, so that other load on the disk affects all of them
SAMPLE_BYTES, SAMPLE_SECONDS = 32 * MIB, 0.05  # limits of one sample
STAGE_BYTES, STAGE_SECONDS = 640 * MIB, 0.6  # limits of each of the two searches
LATENCY_READS = 5
WORTHWHILE = 512 * MIB  # reading a smaller model is cheaper than a probe
MEMORY = 32 * MIB  # shared by the reads of a probe, which may overwrite each other


@dataclass(frozen=True, slots=True)
class Measurement:
    """The rate of ``depth`` concurrent reads of ``request_bytes``."""

    request_bytes: int
    depth: int
    bytes_per_second: float


def choose(measurements: Sequence[Measurement]) -> Measurement:
    """Among settings at ENOUGH of the best rate whose requests last LASTS (else those of the largest requests): the one
    with the fewest bytes in flight, then the smallest requests."""
    best = max(m.bytes_per_second for m in measurements)
    good = [m for m in measurements if m.bytes_per_second >= ENOUGH * best]
    lasting = min(LASTS * best, max(m.request_bytes for m in good))
    good = [m for m in good if m.request_bytes >= lasting]
    return min(good, key=lambda m: (m.request_bytes * m.depth, m.request_bytes))


def find_profile(reader: Reader, files: Sequence[Path], mode: str, cache: ProfileCache) -> tuple[DiskProfile, str]:
    """The profile of the disk that holds ``files``, and a note that describes it.

    ``mode``: "auto" probes a disk that is not in the cache, "refresh" any disk, "off" none. A failed probe does not
    raise: the defaults work on every disk.
    """
    largest = max(files, key=os.path.getsize)
    name = f"disk {disk_name(largest)}"
    big = [file for file in files if os.path.getsize(file) >= max(SIZES)]
    total = sum(map(os.path.getsize, big))
    why_not = None
    if mode == "off":
        why_not = "as requested"
    elif isinstance(reader, MmapReader):
        why_not = "reads through the page cache do not show the disk"
    elif total < WORTHWHILE:
        why_not = f"less than {format_size(WORTHWHILE)} in files to read"
    elif mode == "auto" and (known := cache.get(largest)) is not None:
        return known, f"{name}: {known}"
    if why_not is None:
        try:
            profile = probe(reader, big)
        except (StorageError, RuntimeError) as error:  # a RuntimeError: no thread can be started
            why_not = str(error)
        else:
            lost = cache.put(largest, profile)
            return profile, f"{name}: {profile}" + (f"; not remembered: {lost}" if lost else "")
    return DiskProfile(), f"{name}: {DiskProfile()}; not probed: {why_not}"


def probe(reader: Reader, files: Sequence[Path]) -> DiskProfile:
    """Measure the disk of ``files`` (each of at least max(SIZES) bytes) with random reads through ``reader``.

    Takes about a second and reads at most about the size of ``files``, or twice STAGE_BYTES. Raises StorageError.
    """
    with host_memory(MEMORY) as memory, memoryview(memory) as view:
        for page in range(0, MEMORY, ALIGNMENT):  # page faults are not the disk's time
            view[page] = 1
        with ThreadPoolExecutor(max(DEPTHS), "tierlm-probe") as pool:
            return _Probe(reader, files, view, pool).run()


class _Probe:
    """One probe: samples of settings (request bytes, depth)."""

    def __init__(self, reader: Reader, files: Sequence[Path], memory: memoryview, pool: ThreadPoolExecutor):
        self._reader, self._memory, self._pool = reader, memory, pool
        self._sizes = [os.path.getsize(file) for file in files]
        self._wholes = [
            Extent(file, 0, size, 0, (TensorInfo("the probe's data", file, 0, size, "U8", (size,)),))
            for file, size in zip(files, self._sizes, strict=True)
        ]
        self._rates: dict[tuple[int, int], list[float]] = {}
        self._bytes = 0

    def run(self) -> DiskProfile:
        self._search([(MIDDLE, depth) for depth in DEPTHS])
        depth = choose(self._measurements()).depth
        self._search([(size, depth) for size in SIZES if size * depth <= MAX_IN_FLIGHT])
        found = choose(self._measurements())
        reads = [self._timed(lambda: self._read(found.request_bytes, 0)) for _ in range(LATENCY_READS)]
        return DiskProfile(found.request_bytes, found.depth, found.bytes_per_second, statistics.median(reads))

    def _search(self, settings: Sequence[tuple[int, int]]) -> None:
        """Sample all settings ROUNDS times, within the time and bytes of one stage."""
        until = time.perf_counter() + STAGE_SECONDS
        limit = self._bytes + min(STAGE_BYTES, sum(self._sizes) // 2)
        for setting in [*settings] * ROUNDS:
            if self._bytes >= limit or time.perf_counter() >= until:
                return
            self._rates.setdefault(setting, []).append(self._sample(*setting))

    def _measurements(self) -> list[Measurement]:
        return [Measurement(*setting, statistics.median(rates)) for setting, rates in self._rates.items()]

    def _sample(self, size: int, depth: int) -> float:
        """Bytes a second of ``depth`` threads that read ``size`` bytes repeatedly."""
        turns = iter(range(max(depth, SAMPLE_BYTES // size)))  # shared by the threads
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
