"""The read speed of a folder's disk by size and depth, with a check that the disk served the reads.

Reads go through tierlm's readers into huge pages, like its slots. They use the folder's large files; if there are none,
a temporary file is written, which takes a small share of the free space.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tierlm.checkpoints.disk_profile import disk_name
from tierlm.checkpoints.reader import MmapReader, Reader, Request, host_memory, open_reader
from tierlm.checkpoints.record import ALIGNMENT, Extent, TensorInfo
from tierlm.config import format_size
from tierlm.errors import UsageError
from tierlm.host import available_ram
from tierlm.profiling.profile import DiskRate, percentiles, spread

MIB = 2**20
SIZES = tuple(size * 1024 for size in (64, 256, 1024, 4096, 8192, 32768))
DEPTHS = (1, 2, 4, 8, 16, 32)
ROUNDS = 3
CELL_SECONDS, CELL_BYTES = 0.08, 128 * MIB  # limits of one sample
IN_FLIGHT = 256 * MIB  # limit of the buffers, and at most an eighth of the available memory
SCRATCH_BYTES, SCRATCH_SHARE = 1024 * MIB, 0.05  # limits of the temporary file: bytes, share of the free space
HUGE_PAGE = 2 * MIB
SCRATCH_LEAST = 64 * MIB
ENOUGH = 256 * MIB  # bytes in existing files
PROOF = 0.9  # share of the bytes read that the device must have delivered
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Cell:
    """One setting of a disk's measurement."""

    reader: str
    pattern: str
    request_bytes: int
    depth: int


def cells() -> list[Cell]:
    """All settings that fit memory: random direct reads of every size and depth; sequential and mapped reads to
    compare with."""
    grid = [Cell("direct", "random", size, depth) for size in SIZES for depth in DEPTHS]
    sequential = [Cell("direct", "sequential", 8 * MIB, depth) for depth in (1, 8)]
    mapped = [Cell("mmap", pattern, 8 * MIB, depth) for pattern in ("random", "sequential") for depth in (1, 8)]
    room = min(IN_FLIGHT, available_ram() // 8)
    return [cell for cell in grid + sequential + mapped if cell.request_bytes * cell.depth <= room]


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path`` in /proc/self/mountinfo; "" if unknown."""
    device = os.stat(path).st_dev
    found = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                found = fields[fields.index("-") + 1]
    return found


def device_bytes(path: Path) -> int | None:
    """Bytes read so far from the block device under ``path``; without a counter (overlay), bytes this process has read
    from any device. None if the system has neither."""
    device = os.stat(path).st_dev
    try:
        fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
        return int(fields[2]) * 512
    except OSError:
        pass
    try:
        rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(rows["read_bytes"])
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def files_of(folder: Path) -> Iterator[list[Path]]:
    """Files to read in ``folder``: its own large files, or a temporary one. Raises UsageError if neither works."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder on the disk to measure")
    try:
        own = [file for file in sorted(folder.iterdir()) if file.is_file() and os.access(file, os.R_OK)]
        own = [file for file in own if file.stat().st_size >= max(SIZES)]
    except OSError as error:
        raise UsageError(f"{folder}: its files cannot be looked at: {error.strerror}") from error
    if sum(file.stat().st_size for file in own) >= ENOUGH:
        yield own
        return
    room = int(shutil.disk_usage(folder).free * SCRATCH_SHARE)
    if file_system(folder) in MEMORY_FILE_SYSTEMS:
        room = min(room, available_ram() // 8)
    size = min(SCRATCH_BYTES, room) // max(SIZES) * max(SIZES)
    if size < SCRATCH_LEAST:
        raise UsageError(
            f"{folder}: no files of {format_size(ENOUGH)} to read, and {format_size(room)}, a twentieth of what is "
            f"free, is less than the {format_size(SCRATCH_LEAST)} of the smallest temporary file"
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:  # without a name: a kill leaves nothing
            piece = random.Random(0).randbytes(4 * MIB)  # cannot be compressed or deduplicated
            for number in range(size // len(piece)):
                stream.write(number.to_bytes(8, "little") + piece[8:])
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield [Path(f"/proc/{os.getpid()}/fd/{stream.fileno()}")]
    except OSError as error:
        raise UsageError(f"{folder}: cannot write a file to measure with: {error.strerror}") from error


def measure_disk(
    folder: Path,
    wanted: Sequence[Cell],
    seconds: float,
    done: Callable[[], None] = lambda: None,
    *,
    huge: bool = True,
) -> list[DiskRate]:
    """Measure ``wanted`` in about ``seconds``, in ROUNDS over all settings, so that other load affects all of them.

    ``done`` is called after each sample. ``huge``: read into huge pages, like the engine. Raises UsageError,
    StorageError."""
    with files_of(folder) as files, _Bench(folder, files, wanted, huge) as bench:
        limit = time.perf_counter() + seconds
        for turn in range(ROUNDS):
            for cell in wanted:
                if turn == 0 or time.perf_counter() < limit:
                    bench.sample(cell)
                done()
        return [rate for cell in wanted if (rate := bench.result(cell)) is not None]


class _Bench:
    """Samples of settings over some files, on the disk of ``folder``."""

    def __init__(self, folder: Path, files: Sequence[Path], wanted: Sequence[Cell], huge: bool):
        self._folder, self._files = folder, files
        self._wholes = []
        for file in files:
            size = file.stat().st_size
            tensor = TensorInfo("what the profile reads", file, 0, size, "U8", (size,))
            self._wholes.append(Extent(file, 0, size, 0, (tensor,)))
        nbytes = max((cell.request_bytes * cell.depth for cell in wanted), default=ALIGNMENT)
        self._memory = host_memory(nbytes + 2 * HUGE_PAGE)
        if not huge and hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = -np.frombuffer(self._memory, np.uint8).ctypes.data % HUGE_PAGE  # huge pages need aligned memory
        self._view = memoryview(self._memory)[start : start + nbytes]
        for page in range(0, nbytes, ALIGNMENT):  # page faults are not the disk's time
            self._view[page] = 1
        self._pool = ThreadPoolExecutor(max(DEPTHS))
        self._readers: dict[str, Reader | str] = {"mmap": MmapReader()}
        try:
            self._readers["direct"] = open_reader("direct", list(files))[0]
        except UsageError as error:
            self._readers["direct"] = str(error)
        self._rates: dict[Cell, list[float]] = {}
        self._times: dict[Cell, list[float]] = {}
        self._counted: dict[Cell, list[float]] = {}

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for reader in self._readers.values():
            if isinstance(reader, Reader):
                reader.close()

    def sample(self, cell: Cell) -> None:
        reader = self._readers[cell.reader]
        if isinstance(reader, str):
            return
        if cell.reader == "mmap":
            self._forget()
        # Requests are built beforehand: a small read takes some tens of microseconds, like the interpreter's part.
        requests = [Request(whole, lo, lo + cell.request_bytes) for whole, lo in self._places(cell)]
        times: list[float] = []
        shared = iter(requests)

        def work(lane: int) -> None:
            with self._view[lane * cell.request_bytes : (lane + 1) * cell.request_bytes] as buffer:
                earlier = time.perf_counter()
                for request in shared:
                    reader.read(request, buffer)
                    now = time.perf_counter()
                    times.append(now - earlier)
                    if now >= until:
                        return
                    earlier = now

        before, began = device_bytes(self._files[0]), time.perf_counter()
        until = began + CELL_SECONDS
        list(self._pool.map(work, range(cell.depth)))
        spent = time.perf_counter() - began
        after, moved = device_bytes(self._files[0]), len(times) * cell.request_bytes
        self._rates.setdefault(cell, []).append(moved / spent)
        self._times.setdefault(cell, []).extend(times)
        if before is not None and after is not None:
            self._counted.setdefault(cell, []).append((after - before) / moved)

    def result(self, cell: Cell) -> DiskRate | None:
        if cell not in self._rates:
            return None
        kind = file_system(self._files[0])
        counted = self._counted.get(cell)
        share = None if counted is None else spread(counted).median
        from_ram = ""
        if kind in MEMORY_FILE_SYSTEMS:
            from_ram = f"{kind} is memory"
        elif share is not None and share < PROOF:
            from_ram = f"the device delivered {share:.0%} of the bytes"
        elif share is None and cell.reader == "mmap":
            from_ram = f"maybe: {kind or 'the file system'} has no device counter"
        return DiskRate(
            path=str(self._folder),
            device=f"{disk_name(self._folder)}, {kind}",
            reader=cell.reader,
            pattern=cell.pattern,
            request_bytes=cell.request_bytes,
            depth=cell.depth,
            rate=spread(self._rates[cell]),
            percentiles=percentiles(self._times[cell]),
            device_share=share,
            from_ram=from_ram,
        )

    def _places(self, cell: Cell) -> list[tuple[Extent, int]]:
        """Places to read, shared by all threads: at least two per thread."""
        count = max(2 * cell.depth, CELL_BYTES // cell.request_bytes)
        weights = [whole.stop for whole in self._wholes]
        if cell.pattern == "random":
            chosen = random.choices(self._wholes, weights, k=count)
            starts = [random.randrange(0, whole.stop - cell.request_bytes + 1) for whole in chosen]
            return [(w, at // ALIGNMENT * ALIGNMENT) for w, at in zip(chosen, starts, strict=True)]
        (whole,) = random.choices(self._wholes, weights)
        fit = whole.stop // cell.request_bytes
        first = random.randrange(fit)
        return [(whole, (first + i) % fit * cell.request_bytes) for i in range(count)]

    def _forget(self) -> None:
        """Ask the system to drop the files from the page cache."""
        for file in self._files:
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
