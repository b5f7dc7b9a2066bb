"""The bandwidth of caches and RAM: read, write and copy, with one core and with all, on each NUMA node.

Uses numpy loops, which release the GIL, over blocks that fit the cache. Caches so small that the call overhead
dominates are not measured. No torch.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tierlm.checkpoints.reader import host_memory
from tierlm.host import available_ram
from tierlm.processors import nodes
from tierlm.profiling.profile import MemoryRate, Spread, spread

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
BLOCK = 256 * 2**20  # bytes of RAM per thread, if available; many times a cache's share
TOUCHED, PIECE = 2**30, 32 * 2**20  # bytes touched for the first time; bytes of one sample
ROUNDS, SECONDS = 5, 0.06  # of each figure
SMALLEST = 256 * 2**10  # bytes; the call is about a tenth of the time of a smaller block
Block = NDArray[np.int32]  # ``max`` of int32 runs at memory speed
Action = Callable[[Block], None]


def cache_sizes(folder: Path = CACHES) -> dict[str, int]:
    """Bytes of a core's data caches: {"L1": ..., "L2": ...}, without those that a virtual machine hides."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K") and size[:-1].isdigit():
            found[f"L{level}"] = int(size[:-1]) * 1024
    return found


def measure_touch() -> tuple[float, float]:
    """Seconds a byte of the first write to memory with all cores, in huge pages like slots and in ordinary pages.

    Measures memory that has been free for a while: the host of a virtual machine reclaims it, and memory freed just now
    costs a tenth. So more is touched than this process has freed, and the upper quartile of the pieces counts.
    """
    room = min(TOUCHED, available_ram() // 4)
    huge = host_memory(room)  # kept alive, or the second measurement would reuse its pages
    ordinary = mmap.mmap(-1, room // 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return _touch(huge), _touch(ordinary)


def measure_memory(done: Callable[[], None] = lambda: None) -> list[MemoryRate]:
    """The rates of every cache and of RAM. ``done`` is called after each."""
    places = nodes()
    home, cpus = next(iter(places.items()))
    found = []
    caches = cache_sizes()
    for name, size in caches.items():
        if size // 2 >= SMALLEST:
            found.append(_rate(name, size, size // 2, home, cpus[:1], home, cpus[:1]))
            done()
    threads = max(1, max(len(cpus) for cpus in places.values()))
    room = available_ram() // 4 // threads
    block = min(max(BLOCK, 4 * max(caches.values(), default=0) // threads), room)
    for node, own in places.items():
        for where, theirs in places.items():
            if where == node:
                found.append(_rate("RAM", 0, block, node, own[:1], where, theirs))
                done()
            if len(own) > 1 or where != node:
                found.append(_rate("RAM", 0, block, node, own, where, theirs))
                done()
    return found


def _touch(memory: mmap.mmap) -> float:
    threads = len(os.sched_getaffinity(0))
    view = np.frombuffer(memory, np.uint8)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for piece in np.array_split(view, max(1, len(view) // PIECE)):
            began = time.perf_counter()
            list(pool.map(lambda part: part[:: mmap.PAGESIZE].fill(1), np.array_split(piece, threads)))
            seconds.append((time.perf_counter() - began) / len(piece))
    return sorted(seconds)[len(seconds) * 3 // 4]


def _rate(
    name: str, capacity: int, nbytes: int, node: int, cpus: Sequence[int], where: int, owners: Sequence[int]
) -> MemoryRate:
    """Measure ``cpus`` of ``node``, each on ``nbytes`` placed on the node ``where`` by one of its ``owners``."""
    placed = [owners[i % len(owners)] for i in range(len(cpus))]
    with ThreadPoolExecutor(len(cpus)) as pool:
        blocks = list(pool.map(_fresh, [nbytes] * len(cpus), placed))

        def rate(action: Action) -> Spread:
            rounds = [sum(pool.map(_speed, [action] * len(cpus), blocks, cpus)) for _ in range(ROUNDS + 1)]
            return spread(rounds[1:])  # the first round is warm-up

        return MemoryRate(name, capacity, node, where, len(cpus), rate(_read), rate(_write), rate(_copy))


def _fresh(nbytes: int, cpu: int) -> Block:
    """A block of ``nbytes`` that ``cpu`` writes first, which places it on that processor's node."""
    os.sched_setaffinity(0, {cpu})  # the calling thread only
    block = np.empty(nbytes // 4, np.int32)
    block.fill(1)
    return block


def _speed(action: Action, block: Block, cpu: int) -> float:
    """Bytes a second of one thread on ``cpu``, in whole passes for at least SECONDS."""
    os.sched_setaffinity(0, {cpu})
    passes, spent, began = 0, 0.0, time.perf_counter()
    while spent < SECONDS:
        action(block)
        passes += 1
        spent = time.perf_counter() - began
    return passes * block.nbytes / spent


def _read(block: Block) -> None:
    block.max()


def _write(block: Block) -> None:
    block.fill(3)


def _copy(block: Block) -> None:
    half = len(block) // 2
    np.copyto(block[:half], block[half : 2 * half])
