"""What lossless compression would save, and cost: experts of a model, byte planes apart, zstd, and back.

    python bench/compression.py MODEL [--experts N] [--levels 1 3 9]

For each level the compressed share of the bytes, and how fast one thread makes the record again, with the planes put
together: that has to be as fast as the disk, on processors that the arithmetic needs as well. The last line is JSON.
Needs the package zstandard.
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

from tierlm.models.catalog import Catalog
from tierlm.models.hub import find_model
from tierlm.weights.checkpoint import ITEM_SIZE
from tierlm.weights.reader import read_pieces

ROUNDS = 3


def measure(tensors: list[np.ndarray], level: int) -> tuple[float, float]:
    """Tensors, uint8 [items, bytes of an item] -> the share that zstd leaves, and bytes a second of one thread back."""
    compressor, decompressor = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()
    total = sum(tensor.nbytes for tensor in tensors)
    frames = [[compressor.compress(plane.tobytes()) for plane in tensor.T] for tensor in tensors]
    stored = sum(len(frame) for planes in frames for frame in planes)
    targets = [np.empty_like(tensor) for tensor in tensors]

    def back() -> None:
        for planes, target in zip(frames, targets, strict=True):
            for index, frame in enumerate(planes):
                target[:, index] = np.frombuffer(decompressor.decompress(frame), np.uint8)

    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        back()
        seconds.append(time.perf_counter() - began)
    assert all(np.array_equal(tensor, target) for tensor, target in zip(tensors, targets, strict=True))
    return stored / total, total / statistics.median(seconds)


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
    tensors = [
        np.frombuffer(b"".join(read_pieces(part)), np.uint8).reshape(-1, ITEM_SIZE[part.dtype]) for part in parts
    ]
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
