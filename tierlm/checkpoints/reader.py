"""Readers: bytes of a checkpoint file into memory, memory-mapped or with O_DIRECT, behind one interface."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tierlm.checkpoints.checkpoint import ALIGNMENT, Extent, TensorInfo
from tierlm.checkpoints.codec import Compressed
from tierlm.errors import StorageError, UsageError

PIECE = 16 * 2**20  # bytes of one read of ``read_pieces``


def host_memory(nbytes: int) -> mmap.mmap:
    """Page-aligned memory to read into, allocated by the system on first write.

    Uses huge pages if available: one page fault per 2 MiB, and a direct read has a few segments instead of thousands,
    which can be several times faster. Private, since shared memory may not get huge pages.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass(frozen=True, slots=True)
class Request:
    """One read of part of an extent: file bytes ``lo`` to ``hi``, both aligned, into the record at ``at``. Only the
    bytes ``start`` to ``stop`` are needed; the rest is alignment."""

    extent: Extent
    lo: int
    hi: int

    @property
    def at(self) -> int:
        return self.extent.at + self.lo - self.extent.lo

    @property
    def start(self) -> int:
        return max(self.lo, self.extent.start)

    @property
    def stop(self) -> int:
        return min(self.hi, self.extent.stop)


def split(extent: Extent, request_bytes: int) -> list[Request]:
    """Split an extent into requests of about equal size, at most ``request_bytes`` (a multiple of ALIGNMENT) each, so
    that several threads read a long extent in parallel."""
    nbytes = extent.hi - extent.lo
    if not nbytes:
        return []
    pieces = -(-nbytes // request_bytes)
    each = -(-nbytes // pieces // ALIGNMENT) * ALIGNMENT
    edges = [*range(extent.lo, extent.hi, each), extent.hi]
    return [Request(extent, lo, hi) for lo, hi in itertools.pairwise(edges)]


class Reader(ABC):
    """Reads requests. Thread-safe; raises StorageError, which names file, tensor and offset."""

    name: str

    @abstractmethod
    def read(self, request: Request, buffer: memoryview) -> None:
        """Fill ``buffer``, the bytes ``request.lo`` to ``request.hi``, at least from ``start`` to ``stop``.

        The buffer is ALIGNMENT-aligned and has ``hi - lo`` bytes.
        """

    def descriptor(self, file: Path) -> int | None:
        """A descriptor of ``file`` on which ``preadv`` is equivalent to ``read``; None if there is none."""
        return None

    def repair(self, request: Request, buffer: memoryview, check: Callable[[Path], None]) -> None:
        """Read a damaged request again from the copies of its file until ``check(copy)`` raises no StorageError.
        Raises that error if no copy passes."""
        check(request.extent.file)

    def troubles(self) -> list[str]:
        """Recovered errors so far, in words."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Close all files. No read may be in flight."""


class DirectReader(Reader):
    """O_DIRECT: from the device into the buffer, bypassing the page cache."""

    name = "direct"

    def __init__(self) -> None:
        self._files = _Files(os.O_RDONLY | os.O_DIRECT)

    def read(self, request: Request, buffer: memoryview) -> None:
        wanted = request.stop - request.lo
        got = 0
        try:
            fd = self._files.get(request.extent.file)
            while got < wanted:
                count = os.preadv(fd, [buffer[got:] if got else buffer], request.lo + got)
                got += count
                if count == 0 or got % ALIGNMENT:  # end of file
                    break
        except OSError as error:
            raise failure(request, request.lo + got, error.strerror or str(error)) from error
        if got < wanted:
            raise failure(request, request.lo + got, f"expected {wanted} bytes from {request.lo}, found {got}")

    def descriptor(self, file: Path) -> int | None:
        try:
            return self._files.get(file)
        except OSError:  # ``read`` reports it
            return None

    def close(self) -> None:
        self._files.close()


class MmapReader(Reader):
    """Memory-mapped files. Pages are dropped from the page cache once copied to a slot, since the budget covers all
    memory of the process."""

    name = "mmap"

    def __init__(self) -> None:
        self._files = _Files(os.O_RDONLY)
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def read(self, request: Request, buffer: memoryview) -> None:
        file, start, stop = request.extent.file, request.start, request.stop
        try:
            fd = self._files.get(file)
            size = os.fstat(fd).st_size
            if size < stop:  # touching a page past the end would kill the process
                raise failure(request, size, f"expected at least {stop} bytes in the file, found {size}")
            mapped = self._map(file, fd)
            mapped.madvise(mmap.MADV_WILLNEED, request.lo, stop - request.lo)
            target = np.frombuffer(buffer, np.uint8)
            np.copyto(target[start - request.lo : stop - request.lo], np.frombuffer(mapped, np.uint8)[start:stop])
            mapped.madvise(mmap.MADV_DONTNEED, request.lo, stop - request.lo)
            os.posix_fadvise(fd, request.lo, stop - request.lo, os.POSIX_FADV_DONTNEED)
        except (OSError, ValueError) as error:
            raise failure(request, start, str(error)) from error

    def _map(self, file: Path, fd: int) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                self._maps[file] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            return self._maps[file]

    def close(self) -> None:
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()
        self._files.close()


def open_reader(name: str, files: Iterable[Path]) -> tuple[Reader, str]:
    """The reader ``name`` ("auto", "direct" or "mmap") for ``files``, and the reason for it.

    Raises UsageError if "direct" is requested and the file system refuses it.
    """
    if name == "mmap":
        return MmapReader(), "mmap: as requested"
    refusal = next((reason for file in files if (reason := _direct_refusal(file))), None)
    if refusal is None:
        return DirectReader(), f"direct: {'as requested' if name == 'direct' else 'the file system supports O_DIRECT'}"
    if name == "direct":
        raise UsageError(f"reader direct: {refusal}; use reader 'mmap' or 'auto'")
    return MmapReader(), f"mmap: {refusal}"


def read_pieces(tensor: TensorInfo, into: memoryview | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in order, at most PIECE at a time, without leaving them in the page cache.

    ``into``: memory for the whole tensor; else each piece gets its own. A tensor inside a compressed record costs a
    read of the whole record."""
    if tensor.inside is not None:
        stored = TensorInfo(tensor.name, tensor.file, tensor.inside.start, tensor.inside.nbytes, "U8", ())
        begin = tensor.offset - tensor.inside.start
        part = restored(stored, tensor.inside, b"".join(read_pieces(stored)))[begin : begin + tensor.nbytes]
        if into is not None:
            into[:] = part
        yield part
        return
    extent = Extent(tensor.file, tensor.offset, tensor.offset + tensor.nbytes, 0, (tensor,))
    at = tensor.offset
    try:
        with open(tensor.file, "rb") as stream:
            stream.seek(at)
            while at < extent.stop:
                size = min(PIECE, extent.stop - at)
                done = at - extent.start
                piece = memoryview(bytearray(size)) if into is None else into[done : done + size]
                got = stream.readinto(piece)
                if got < len(piece):
                    raise failure(
                        Request(extent, at, extent.stop), at + got, f"expected {len(piece)} bytes, found {got}"
                    )
                os.posix_fadvise(stream.fileno(), at, got, os.POSIX_FADV_DONTNEED)
                yield piece
                at += got
    except OSError as error:
        raise failure(Request(extent, at, extent.stop), at, error.strerror or str(error)) from error


def restored(tensor: TensorInfo, inside: Compressed, stored: bytes | bytearray) -> memoryview:
    """Decompress the record that ``tensor`` stores as ``stored``. Raises StorageError."""
    record = np.empty(inside.raw, np.uint8)
    try:
        inside.restore(np.frombuffer(stored, np.uint8), record)
    except ValueError as error:
        extent = Extent(tensor.file, tensor.offset, tensor.offset + tensor.nbytes, 0, (tensor,))
        raise failure(Request(extent, extent.lo, extent.hi), tensor.offset, f"zstd: {error}") from error
    return record.data


def failure(request: Request, offset: int, what: str) -> StorageError:
    """The StorageError of a read that failed at file offset ``offset``."""
    file, tensor = str(request.extent.file), request.extent.tensor_at(offset)
    return StorageError(f"{file}: reading {tensor} at offset {offset}: {what}", file=file, tensor=tensor, offset=offset)


class _Files:
    """File descriptors, each opened at its first use."""

    def __init__(self, flags: int):
        self._flags = flags | os.O_CLOEXEC
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def get(self, file: Path) -> int:
        if (known := self._open.get(file)) is not None:  # safe without the lock, and most files are open
            return known
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, self._flags)
            return self._open[file]

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()


def _direct_refusal(file: Path) -> str | None:
    """Try to read ``file`` with O_DIRECT into 4 KiB-aligned memory. Returns the reason if that fails, else None."""
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, ALIGNMENT) as page:
                os.preadv(fd, [page], 0)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{file} cannot be read with O_DIRECT ({error.strerror})"
    return None
