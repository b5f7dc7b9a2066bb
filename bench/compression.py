"""What lossless compression saves and costs: byte planes of a model's experts through zstd, and back.

Blocks of 256 KiB stay in the processor's cache while their planes are joined. A plane that zstd leaves at more than 95
% is stored as it is: in bf16 that is the low one.

    python bench/compression.py MODEL [--experts N] [--levels 1 3 9]

Prints for each level the compressed share of the bytes, and how fast one thread restores the record, planes joined:
that must match the disk's speed, on processors that the arithmetic needs too. The last line is JSON. Needs zstandard:
pip install '.[zstd]'.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
import zstandard

from tierlm.checkpoints.checkpoint import ITEM_SIZE
from tierlm.checkpoints.hub import find_model
from tierlm.checkpoints.reader import read_pieces
from tierlm.models.catalog import Catalog

ROUNDS = 5
BLOCK = 2**18  # bytes
WORTH = 0.95


def measure(tensors: list[np.ndarray], level: int) -> tuple[float, float]:
    """Tensors, uint8 [items, bytes of an item] -> the compressed share, and bytes/s that one thread restores."""
    compressor, decompressor = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()
    blocks = [
        tensor[at : at + BLOCK // tensor.shape[1]]
        for tensor in tensors
        for at in range(0, len(tensor), BLOCK // tensor.shape[1])
    ]
    stored = [[store(compressor, plane.tobytes()) for plane in block.T] for block in blocks]
    targets = [np.empty_like(block) for block in blocks]

    def back() -> None:
        for planes, target in zip(stored, targets, strict=True):
            raw = [plane if len(plane) == len(target) else decompressor.decompress(plane) for plane in planes]
            join([np.frombuffer(plane, np.uint8) for plane in raw], target)

    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        back()
        seconds.append(time.perf_counter() - began)
    assert all(np.array_equal(block, target) for block, target in zip(blocks, targets, strict=True))
    total = sum(tensor.nbytes for tensor in tensors)
    return sum(len(plane) for planes in stored for plane in planes) / total, total / statistics.median(seconds)


def store(compressor: zstandard.ZstdCompressor, plane: bytes) -> bytes:
    packed = compressor.compress(plane)
    return packed if len(packed) < WORTH * len(plane) else plane


def join(planes: list[np.ndarray], target: np.ndarray) -> None:
    """Planes, uint8 [items] each, into uint8 [items, bytes of an item]."""
    if len(planes) == 2:  # writes whole vectors; storing bytes two apart would write them one by one
        items = target.view("<u2")[:, 0]
        items[...] = planes[1]
        items <<= 8
        items |= planes[0]
        return
    for index, plane in enumerate(planes):
        target[:, index] = plane


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 3, 9])
    arguments = parser.parse_args()
    catalog = Catalog(Path(find_model(arguments.model)))
    random.seed(0)
    keys = random.sample(catalog.experts(), min(arguments.experts, len(catalog.experts())))
    parts = [tensor for key in keys for extent in catalog.record(key).extents for tensor in extent.tensors]
    tensors = []  # joined: in small models each is less than a block
    for size in sorted({ITEM_SIZE[part.dtype] for part in parts}):
        alike = (piece for part in parts if ITEM_SIZE[part.dtype] == size for piece in read_pieces(part))
        tensors.append(np.frombuffer(b"".join(alike), np.uint8).reshape(-1, size))
    total = sum(tensor.nbytes for tensor in tensors)
    print(f"{len(keys)} experts, {total / 1e6:.1f} MB, {', '.join(sorted({part.dtype for part in parts}))}")
    found = []
    for level in arguments.levels:
        share, rate = measure(tensors, level)
        print(f"zstd level {level}: {share:.1%} of the bytes; back at {rate / 1e9:.2f} GB/s a thread")
        found.append({"level": level, "share": share, "bytes_per_second": rate})
    print(json.dumps({"model": arguments.model, "bytes": total, "levels": found}))


if __name__ == "__main__":
    main()
