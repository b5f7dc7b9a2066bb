"""Readers: bytes of a checkpoint file into memory, through the page cache or with O_DIRECT, behind one interface."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tierlm.checkpoints.codec import Compressed
from tierlm.checkpoints.record import ALIGNMENT, Extent, TensorInfo
from tierlm.errors import StorageError, UsageError
from tierlm.files import Stamp, changed, open_regular

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

    def wait(self, file: Path, start: int, stop: int) -> None:
        """Return once the bytes ``start`` to ``stop`` of ``file`` are on the disk; ``read`` does so. Raises OSError."""

    def descriptor(self, file: Path) -> int | None:
        """A descriptor of ``file`` on which ``preadv`` is equivalent to ``read``; None if there is none."""
        return None

    def repair(self, request: Request, buffer: memoryview, check: Callable[[Path], None]) -> None:
        """Read a damaged request again from the copies of its file until ``check(copy)`` raises no StorageError.
        Raises that error if no copy passes."""
        check(request.extent.file)

    @property
    def arrived(self) -> tuple[int, int] | None:
        """Bytes of the files that are on the disk, and all; None if nothing is to arrive."""
        return None

    def troubles(self) -> list[str]:
        """Recovered errors so far, in words."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Close all files. No read may be in flight."""


class FileReader(Reader):
    """Reads files by ``preadv``. Opens each at its first read, and compares it with its stamp in ``stamps``, if any:
    then, and when a read fails."""

    flags = 0

    def __init__(self, stamps: Mapping[Path, Stamp] | None = None):
        self._stamps = stamps or {}
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, request: Request, buffer: memoryview) -> None:
        file, wanted, got = request.extent.file, request.stop - request.lo, 0
        try:
            fd = self._fd(file)
            self._begin(fd, request)
            while got < wanted:
                count = os.preadv(fd, [buffer[got:] if got else buffer], request.lo + got)
                got += count
                if count == 0 or got % ALIGNMENT:  # end of file
                    break
            self._end(fd, request)
        except OSError as error:
            raise self._failure(request, got, error.strerror or str(error)) from error
        if got < wanted:
            raise self._failure(request, got, f"expected {wanted} bytes from {request.lo}, found {got}")

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def _begin(self, fd: int, request: Request) -> None:
        """Called before a read."""

    def _end(self, fd: int, request: Request) -> None:
        """Called after a read."""

    def _fd(self, file: Path) -> int:
        if (known := self._open.get(file)) is not None:  # safe without the lock, and most files are open
            return known
        with self._lock:
            if file not in self._open:
                self._open[file] = open_regular(file, self.flags, self._stamps.get(file))
            return self._open[file]

    def _failure(self, request: Request, got: int, what: str) -> StorageError:
        file = request.extent.file
        if file in self._open and file in self._stamps and (change := changed(self._open[file], self._stamps[file])):
            what = f"{what}; {change}"
        return failure(request, request.lo + got, what)


class DirectReader(FileReader):
    """O_DIRECT: from the device into the buffer, bypassing the page cache."""

    name = "direct"
    flags = os.O_DIRECT

    def descriptor(self, file: Path) -> int | None:
        try:
            return self._fd(file)
        except OSError:  # ``read`` reports it
            return None


class MmapReader(FileReader):
    """Through the page cache, for file systems without O_DIRECT. Pages are dropped once copied to a slot, since the
    budget covers all memory of the process. Not mapped: a file truncated under a map ends the process by SIGBUS."""

    name = "mmap"

    def _begin(self, fd: int, request: Request) -> None:
        os.posix_fadvise(fd, request.lo, request.stop - request.lo, os.POSIX_FADV_WILLNEED)

    def _end(self, fd: int, request: Request) -> None:
        os.posix_fadvise(fd, request.lo, request.stop - request.lo, os.POSIX_FADV_DONTNEED)


def open_reader(name: str, files: Iterable[Path], stamps: Mapping[Path, Stamp] | None = None) -> tuple[Reader, str]:
    """The reader ``name`` ("auto", "direct" or "mmap") for ``files``, and the reason for it. ``stamps``: see
    FileReader.

    Raises UsageError if "direct" is requested and the file system refuses it.
    """
    if name == "mmap":
        return MmapReader(stamps), "mmap: as requested"
    refusal = next((reason for file in files if (reason := _direct_refusal(file))), None)
    if refusal is None:
        return DirectReader(
            stamps
        ), f"direct: {'as requested' if name == 'direct' else 'the file system supports O_DIRECT'}"
    if name == "direct":
        raise UsageError(f"reader direct: {refusal}; use reader 'mmap' or 'auto'")
    return MmapReader(stamps), f"mmap: {refusal}"


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
        with open(open_regular(tensor.file), "rb") as stream:
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


def _direct_refusal(file: Path) -> str | None:
    """Try to read ``file`` with O_DIRECT into 4 KiB-aligned memory. Returns the reason if that fails, else None."""
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    try:
        fd = open_regular(file, os.O_DIRECT)
        try:
            with mmap.mmap(-1, ALIGNMENT) as page:
                os.preadv(fd, [page], 0)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{file} cannot be read with O_DIRECT ({error.strerror})"
    return None
