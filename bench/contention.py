"""What the arithmetic and the disk deliver together: expert kernels on resident weights beside direct reads.

    python bench/contention.py MODEL

Both need processors (on a virtual machine the host's part of a read does too) and memory bandwidth. Neither keeps the
speed it has alone, which limits what prefetch can gain. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from disk import stolen
from rich.console import Console
from rich.table import Table

from tierlm.kernels import Weight, gated_mlps

READ = 2 * 2**20
HIDDEN, WIDTH, TOGETHER = 2048, 1408, 6  # a DeepSeek-V2-Lite expert, and how many a token uses
RESIDENT = 2 * 2**30


def huge(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes + 2 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Reads:
    """``depth`` threads that read random places until stopped."""

    def __init__(self, files: Sequence[Path], depth: int):
        self.files = [(os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size) for file in files]
        self.counts, self.stop = [0] * depth, False
        self.memory = memoryview(huge(max(1, depth) * READ))
        self.threads = [threading.Thread(target=self._read, args=(lane,)) for lane in range(depth)]
        for thread in self.threads:
            thread.start()

    def _read(self, lane: int) -> None:
        chance, buffer = random.Random(lane), self.memory[lane * READ : (lane + 1) * READ]
        while not self.stop:
            fd, size = chance.choice(self.files)
            self.counts[lane] += os.preadv(fd, [buffer], chance.randrange((size - READ) // 4096) * 4096)

    def close(self) -> None:
        self.stop = True
        for thread in self.threads:
            thread.join()
        for fd, _ in self.files:
            os.close(fd)


def experts_of(slab: torch.Tensor) -> list[tuple[Weight, Weight, Weight]]:
    size = HIDDEN * WIDTH
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return [
        tuple(Weight(slab[(at + i) * size : (at + i + 1) * size].view(shape), "bf16") for i, shape in enumerate(shapes))
        for at in range(0, slab.numel() // size - 2, 3)
    ]  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()

    files = [file for file in args.model.glob("*.safetensors") if file.stat().st_size > 2 * READ]
    experts = experts_of(torch.frombuffer(huge(RESIDENT), dtype=torch.bfloat16).normal_(0, 0.02))
    x, outputs = torch.randn(1, HIDDEN), [torch.empty(1, HIDDEN) for _ in range(TOGETHER)]
    table = Table("compute threads", "reads at a time", "G weights/s", "disk GB/s", "stolen cores")
    found = []
    for threads in (torch.get_num_threads(), max(1, torch.get_num_threads() // 2)):
        torch.set_num_threads(threads)
        for depth in (0, 1, 2, 4, 8):
            reads, chance, steps = Reads(files, depth), random.Random(0), 0
            time.sleep(0.2)
            before, taken, began = sum(reads.counts), stolen(), time.perf_counter()
            while time.perf_counter() - began < args.seconds:
                some = chance.sample(experts, TOGETHER)
                gated_mlps([(x, y, expert) for y, expert in zip(outputs, some, strict=True)])
                steps += 1
            seconds = time.perf_counter() - began
            row = {"threads": threads, "depth": depth}
            rates = {
                "weights": steps * TOGETHER * 3 * HIDDEN * WIDTH / seconds,
                "disk": (sum(reads.counts) - before) / seconds,
                "stolen": (stolen() - taken) / seconds,
            }
            reads.close()
            found.append(row | rates)
            table.add_row(f"{threads}", f"{depth}", *(f"{rates[n] / u:.2f}" for n, u in
                          (("weights", 1e9), ("disk", 1e9), ("stolen", 1))))  # fmt: skip
    Console().print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
