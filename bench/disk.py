"""The disk under a model: what it can deliver, and what it has delivered."""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import random
import time
from pathlib import Path

BLOCK = 8 * 2**20
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def weights_of(model: Path) -> list[Path]:
    """The files that hold the weights of a folder or of a GGUF file."""
    return [model] if model.is_file() else [*model.glob("*.safetensors")]


def disk_ceiling(model: Path, total: int = 2 * 2**30, depth: int = 8) -> tuple[float, float]:
    """Bytes/s of random direct reads of ``model``, into small pages and into huge pages.

    A request to a virtual disk has a limited number of segments; 4 KiB pages exhaust them at 1 MiB, huge pages do not:
    here a factor of three. The second value is the ceiling; the first is what a tool without huge pages sees. Raises
    ValueError for a model without a file larger than a read.
    """
    places = [(file, offset) for file in weights_of(model) for offset in range(0, file.stat().st_size - BLOCK, BLOCK)]
    if not places:
        raise ValueError(f"{model}: no file is larger than the {BLOCK} bytes that are read at a time")
    chosen = random.sample(places, min(len(places), total // BLOCK))
    files = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file, _ in chosen}

    def speed(advice: int) -> float:
        memory = mmap.mmap(-1, (depth + 1) * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
        memory.write(bytes(len(memory)))  # already touched, like a slot
        view = memoryview(memory)

        def read(lane: int) -> int:
            buffer = view[lane * BLOCK : (lane + 1) * BLOCK]
            return sum(os.preadv(files[file], [buffer], offset) for file, offset in chosen[lane::depth])

        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(depth) as pool:
            assert sum(pool.map(read, range(depth))) == len(chosen) * BLOCK
        return len(chosen) * BLOCK / (time.perf_counter() - began)

    speeds = speed(mmap.MADV_NOHUGEPAGE), speed(mmap.MADV_HUGEPAGE)
    for fd in files.values():
        os.close(fd)
    return speeds


def bytes_read(path: Path) -> int:
    """Bytes read so far, by all processes, from the block device of ``path``. Raises OSError if there is none."""
    device = os.stat(path).st_dev
    counters = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(counters[2]) * 512


def own_bytes_read() -> int:
    """Bytes that this process has caused to be read from disks so far: directly, by page faults and by read-ahead."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


def stolen() -> float:
    """Core-seconds so far in which this machine's processors were ready but its host ran something else. On a virtual
    disk that is largely the host's own work on the reads. 0 if the system does not tell."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def drop_page_cache(files: list[Path]) -> str:
    """Drop the page cache: all of it where permitted, otherwise that of ``files``. Returns which, in words.

    Pages cached before a run belong to another memory cgroup: the run would have them beyond its limit.
    """
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        return "the page cache of the model's files was dropped before each run; that of everything needs root"
    return "the whole page cache was dropped before each run"
