"""Lossless compression of a record of floats: byte planes (byte k of every item), each compressed with zstd.

The high bytes of trained weights hold the exponents and shrink to half or less; the low bytes are noise and stay raw.
A record is cut into blocks of at most BLOCK bytes, each of one item size. Stored: the length of each plane of each
block as uint32, then the planes. A plane of full length is not compressed. No torch.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierlm.checkpoints.checksum import checksum
from tierlm.errors import UsageError

BLOCK = 2**18  # bytes; the planes of a block fit the processor's cache
LEVEL = 1  # higher levels decompress more slowly and gain nothing (bench/compression.py)
WORTH = 0.95  # a plane that zstd leaves longer than this share is stored raw
ROUNDS, SAMPLE = 5, 2**23  # of a measurement; bytes of each record

Run = tuple[int, int]  # total bytes, bytes of an item


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed record: bytes ``start`` to ``start + nbytes`` of a file. ``runs``: its items; ``checksum``: of the
    decompressed record."""

    start: int
    nbytes: int
    runs: tuple[Run, ...]
    checksum: str

    @property
    def raw(self) -> int:
        """Decompressed bytes."""
        return sum(nbytes for nbytes, _ in self.runs)

    def restore(self, stored: NDArray[np.uint8], out: NDArray[np.uint8], check: bool = True) -> None:
        """``decompress``, and verify the checksum if ``check``. Raises ValueError."""
        decompress(stored, out, self.runs)
        if check and (found := checksum(out[: self.raw].data)) != self.checksum:
            raise ValueError(f"expected a record with the checksum {self.checksum}, found {found}")


def least_and_most(runs: Sequence[Run]) -> tuple[int, int]:
    """Bounds of a record's stored bytes."""
    lengths = 4 * sum(-(-nbytes // BLOCK) * width for nbytes, width in runs)
    return lengths, lengths + sum(nbytes for nbytes, _ in runs)


def compress(record: bytes, runs: Sequence[Run]) -> bytes:
    """The stored bytes of ``record``. Raises UsageError without zstandard."""
    compressor = load_zstandard().ZstdCompressor(LEVEL)
    data = np.frombuffer(record, np.uint8)
    planes: list[bytes] = []
    for start, stop, width in _blocks(runs):
        for plane in data[start:stop].reshape(-1, width).T:
            raw = plane.tobytes()
            packed = compressor.compress(raw)
            planes.append(packed if len(packed) < WORTH * len(raw) else raw)
    return np.array([len(plane) for plane in planes], "<u4").tobytes() + b"".join(planes)


def decompress(stored: NDArray[np.uint8], out: NDArray[np.uint8], runs: Sequence[Run]) -> None:
    """Decompress a record into the start of ``out``. Releases the GIL.

    ``stored`` may be the end of the same memory if that is longer than the record: no plane is longer than its raw
    bytes, so output never overwrites unread input. Raises ValueError for input that ``compress`` did not write."""
    library = load_zstandard()
    decompressor = library.ZstdDecompressor()
    at, _ = least_and_most(runs)
    lengths = iter(stored[:at].copy().view("<u4").tolist())
    for start, stop, width in _blocks(runs):
        size = (stop - start) // width
        planes: list[NDArray[np.uint8]] = []
        for length in (next(lengths, 0) for _ in range(width)):
            plane = stored[at : at + length]
            if length < size:
                try:
                    if library.frame_content_size(plane) != size:  # checked before memory is allocated
                        raise ValueError(f"byte {at}: not a plane of {size} bytes")
                    plane = np.frombuffer(decompressor.decompress(plane, max_output_size=size), np.uint8)
                except library.ZstdError as error:
                    raise ValueError(f"byte {at}: {error}") from error
            if len(plane) != size:
                raise ValueError(f"byte {at}: expected {size} bytes, found {len(plane)}")
            planes.append(plane.copy() if length == size else plane)
            at += length
        _join(out[start:stop], planes)
    if at != len(stored):
        raise ValueError(f"expected {at} bytes, found {len(stored)}")


def measure(records: Sequence[tuple[bytes, Sequence[Run]]], threads: int) -> tuple[float, float]:
    """The compression ratio (stored / raw) of some records, and the decompression rate of ``threads`` threads in raw
    bytes a second, each with its own output. Only the first SAMPLE bytes of a record count."""
    records = [_beginning(*record) for record in records]
    stored = [np.frombuffer(compress(*record), np.uint8) for record in records]
    outs = np.empty((threads, max(len(raw) for raw, _ in records)), np.uint8)
    total = sum(len(raw) for raw, _ in records)

    def restore(out: NDArray[np.uint8]) -> None:
        for each, (_, runs) in zip(stored, records, strict=True):
            decompress(each, out, runs)

    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(pool.map(restore, outs))
            seconds.append(time.perf_counter() - began)
    return sum(map(len, stored)) / total, threads * total / statistics.median(seconds)


def _beginning(record: bytes, runs: Sequence[Run]) -> tuple[bytes, list[Run]]:
    left, found = SAMPLE, list[Run]()
    for nbytes, width in runs:
        found.append((min(nbytes, left // width * width), width))
        left -= found[-1][0]
    return record[: SAMPLE - left], found


def _join(target: NDArray[np.uint8], planes: Sequence[NDArray[np.uint8]]) -> None:
    if len(planes) == 2:  # vectorised; strided stores would go byte by byte
        items = target.view("<u2")
        items[...] = planes[1]
        items <<= 8
        items |= planes[0]
        return
    for index, plane in enumerate(planes):
        target[index :: len(planes)] = plane


def _blocks(runs: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """Start, stop and item size of each block."""
    at = 0
    for nbytes, width in runs:
        for start in range(at, at + nbytes, BLOCK):
            yield start, min(start + BLOCK, at + nbytes), width
        at += nbytes


def load_zstandard() -> Any:
    """Import the optional module zstandard. Raises UsageError if it is missing."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise UsageError("codec zstd: the package zstandard is missing; pip install tierlm[zstd]") from None
