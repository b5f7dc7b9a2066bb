"""Readers: bytes of a checkpoint file into memory. Two of them, memory-mapped and O_DIRECT, behind one interface."""

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

PIECE = 16 * 2**20  # bytes of a tensor that is read from end to end


def host_memory(nbytes: int) -> mmap.mmap:
    """Memory to read into, page-aligned, which takes up room only as it is written to.

    On huge pages where there are any: one touch for 2 MiB, and a direct read is a few segments instead of thousands,
    which a disk may take several times faster. Private, since shared memory may get none.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass(frozen=True, slots=True)
class Request:
    """One read of part of an extent: the bytes from file offset ``lo`` to ``hi``, both aligned, into the record at
    ``at``. Of these ``start`` to ``stop`` are wanted; the rest only fills up the alignment."""

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
    """The requests, of at most ``request_bytes`` (a multiple of ALIGNMENT) each and about as long as one another, that
    together read one extent: what is longer is read by several threads at once."""
    nbytes = extent.hi - extent.lo
    if not nbytes:
        return []
    pieces = -(-nbytes // request_bytes)
    each = -(-nbytes // pieces // ALIGNMENT) * ALIGNMENT
    edges = [*range(extent.lo, extent.hi, each), extent.hi]
    return [Request(extent, lo, hi) for lo, hi in itertools.pairwise(edges)]


class Reader(ABC):
    """Reads requests. Called from many threads at once; raises StorageError, which names file, tensor and offset."""

    name: str

    @abstractmethod
    def read(self, request: Request, buffer: memoryview) -> None:
        """Fill ``buffer``, which stands for ``request.lo`` to ``request.hi``, at least where bytes are wanted.

        The buffer is ALIGNMENT-aligned and of ``hi - lo`` bytes.
        """

    def descriptor(self, file: Path) -> int | None:
        """The descriptor of ``file``, if ``preadv`` on it does what ``read`` does; None if only ``read`` will do."""
        return None

    def repair(self, request: Request, buffer: memoryview, check: Callable[[Path], None]) -> None:
        """Read what turned out to be wrong from another copy of its file, until ``check``, called with the name of the
        copy, raises no StorageError. Raises what it raised where there is no other copy."""
        check(request.extent.file)

    def troubles(self) -> list[str]:
        """What went wrong so far and was got round, in words."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Close all files. No read may be under way."""


class DirectReader(Reader):
    """O_DIRECT: from the device straight into the buffer, past the page cache."""

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
                if count == 0 or got % ALIGNMENT:  # the end of the file
                    break
        except OSError as error:
            raise failure(request, request.lo + got, error.strerror or str(error)) from error
        if got < wanted:
            raise failure(request, request.lo + got, f"expected {wanted} bytes from {request.lo}, found {got}")

    def descriptor(self, file: Path) -> int | None:
        try:
            return self._files.get(file)
        except OSError:  # which ``read`` will tell of
            return None

    def close(self) -> None:
        self._files.close()


class MmapReader(Reader):
    """Memory-mapped shards. What was copied out is dropped from the page cache again: the budget is the process's
    whole memory, and the bytes now live in a slot."""

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
    """The reader called ``name`` ("auto", "direct" or "mmap") for ``files``, and why it is that one.

    Raises UsageError where "direct" is asked for and the file system refuses it.
    """
    if name == "mmap":
        return MmapReader(), "mmap: as asked"
    refusal = next((reason for file in files if (reason := _direct_refusal(file))), None)
    if refusal is None:
        return DirectReader(), "direct: as asked" if name == "direct" else "direct: the file system supports O_DIRECT"
    if name == "direct":
        raise UsageError(f"reader direct: {refusal}; use reader 'mmap' or 'auto'")
    return MmapReader(), f"mmap: {refusal}"


def read_pieces(tensor: TensorInfo, into: memoryview | None = None) -> Iterator[memoryview]:
    """The bytes of a tensor from its first to its last, at most PIECE at a time, through the page cache, which does not
    keep them. ``into``: memory for all of them; else each piece has its own. Of a tensor inside a compressed record the
    whole record is read."""
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
    """The record that was ``stored`` as ``tensor``. Raises StorageError."""
    record = np.empty(inside.raw, np.uint8)
    try:
        inside.restore(np.frombuffer(stored, np.uint8), record)
    except ValueError as error:
        extent = Extent(tensor.file, tensor.offset, tensor.offset + tensor.nbytes, 0, (tensor,))
        raise failure(Request(extent, extent.lo, extent.hi), tensor.offset, f"zstd: {error}") from error
    return record.data


def failure(request: Request, offset: int, what: str) -> StorageError:
    """The error of a read that went wrong at ``offset`` of its file."""
    file, tensor = str(request.extent.file), request.extent.tensor_at(offset)
    return StorageError(f"{file}: reading {tensor} at offset {offset}: {what}", file=file, tensor=tensor, offset=offset)


class _Files:
    """File descriptors, each opened once, at its first use."""

    def __init__(self, flags: int):
        self._flags = flags | os.O_CLOEXEC
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def get(self, file: Path) -> int:
        known = self._open.get(file)  # a dictionary can be asked by many threads, and most files are known
        if known is not None:
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
    """Why ``file`` cannot be read with O_DIRECT into 4 KiB-aligned memory, or None. Tried out."""
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
