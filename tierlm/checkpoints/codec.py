"""Lossless compression of a record of floats: bytes apart by their place in an item, and zstd over each such plane.

The high bytes of trained weights, which hold the exponents, take half the room or less; the low ones are noise, and
stay as they are. A record is cut into blocks of at most BLOCK bytes, none of which holds items of two sizes. What is
stored: the length of each plane of each block, as uint32, then the planes. One that is as long as it was is not
compressed. No torch.
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

BLOCK = 2**18  # bytes: what its planes are put together from stays in the processor's cache
LEVEL = 1  # higher ones take longer back, and gain nothing (bench/compression.py)
WORTH = 0.95  # of its length; a plane that zstd leaves longer is stored as it is
ROUNDS, SAMPLE = 5, 2**23  # of a measurement; bytes of each record

Run = tuple[int, int]  # bytes, and bytes of an item


@dataclass(frozen=True, slots=True)
class Compressed:
    """A record as it is stored: the bytes ``start`` to ``start + nbytes`` of a file, which stand for items of the sizes
    ``runs``. ``checksum``: of the record itself."""

    start: int
    nbytes: int
    runs: tuple[Run, ...]
    checksum: str

    @property
    def raw(self) -> int:
        """The bytes of the record that they become."""
        return sum(nbytes for nbytes, _ in self.runs)

    def restore(self, stored: NDArray[np.uint8], out: NDArray[np.uint8], check: bool = True) -> None:
        """As ``decompress``. ``check``: compare the record with its checksum."""
        decompress(stored, out, self.runs)
        if check and (found := checksum(out[: self.raw].data)) != self.checksum:
            raise ValueError(f"expected a record with the checksum {self.checksum}, found {found}")


def least_and_most(runs: Sequence[Run]) -> tuple[int, int]:
    """Between how many and how many bytes are stored for a record."""
    lengths = 4 * sum(-(-nbytes // BLOCK) * width for nbytes, width in runs)
    return lengths, lengths + sum(nbytes for nbytes, _ in runs)


def compress(record: bytes, runs: Sequence[Run]) -> bytes:
    """What is stored for ``record``. UsageError without zstandard."""
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
    """Make the record again at the beginning of ``out``. ``stored`` may lie at the end of the same memory, if that
    ends behind the record: no plane takes more room than it stands for, so the record never catches up with what is
    still to be read. Raises ValueError where ``stored`` is not what ``compress`` made. Lets other threads run."""
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
                    if library.frame_content_size(plane) != size:  # before anything of that size is made
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
    """The share of the bytes of some records that is stored, and how many bytes of records a second ``threads`` threads
    make again, each in memory of its own. Of large records the beginning stands for the rest."""
    records = [_beginning(*record) for record in records]
    stored = [np.frombuffer(compress(*record), np.uint8) for record in records]
    outs = np.empty((threads, max(len(raw) for raw, _ in records)), np.uint8)
    total = sum(len(raw) for raw, _ in records)

    def back(out: NDArray[np.uint8]) -> None:
        for each, (_, runs) in zip(stored, records, strict=True):
            decompress(each, out, runs)

    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(pool.map(back, outs))
            seconds.append(time.perf_counter() - began)
    return sum(map(len, stored)) / total, threads * total / statistics.median(seconds)


def _beginning(record: bytes, runs: Sequence[Run]) -> tuple[bytes, list[Run]]:
    left, found = SAMPLE, list[Run]()
    for nbytes, width in runs:
        found.append((min(nbytes, left // width * width), width))
        left -= found[-1][0]
    return record[: SAMPLE - left], found


def _join(target: NDArray[np.uint8], planes: Sequence[NDArray[np.uint8]]) -> None:
    if len(planes) == 2:  # whole vectors at a time, where bytes two apart would be stored one by one
        items = target.view("<u2")
        items[...] = planes[1]
        items <<= 8
        items |= planes[0]
        return
    for index, plane in enumerate(planes):
        target[index :: len(planes)] = plane


def _blocks(runs: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """Where each block begins and ends, and the bytes of its items."""
    at = 0
    for nbytes, width in runs:
        for start in range(at, at + nbytes, BLOCK):
            yield start, min(start + BLOCK, at + nbytes), width
        at += nbytes


def load_zstandard() -> Any:
    """The module zstandard, which is an extra. Raises UsageError where it is missing."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise UsageError("codec zstd: the package zstandard is missing; pip install tierlm[zstd]") from None
