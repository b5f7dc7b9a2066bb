"""The speed of the kernels, alone and beside disk reads, of a card and its links, and of decompression.

The only file of this folder that loads torch, when a function is called.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierlm.checkpoints.reader import host_memory
from tierlm.checkpoints.record import ALIGNMENT
from tierlm.formats import FORMATS
from tierlm.host import available_ram
from tierlm.profiling.profile import KernelRate, Spread, spread

if TYPE_CHECKING:
    from torch import Tensor

    from tierlm.kernels import Weight

# About a DeepSeek-V2-Lite expert, in whole blocks of every format; experts a token uses in a layer.
HIDDEN, WIDTH, TOGETHER = 2048, 1536, 6
# The formats to measure: those with kernels that tierlm or llama.cpp make. Others, f32 and f16 are assumed to be
# memory-bound like bf16.
MEASURED = tuple(
    f.name
    for f in FORMATS.values()
    if ((f.floats and f.packable) or (f.rounds and not f.suffix)) and f.name not in ("f32", "f16")
)
# Two more than a multiple of four, the average case: the kernels take four rows at a time and the rest one by one. 62
# is close to the limit of the float kernels (kernels/native.py).
ROWS = (1, 10, 34, 62, 256)
MANY = 34  # rows of an expert in a prefill
RESIDENT = 256 * 2**20  # bytes of experts; more than any cache holds
ROUNDS, SECONDS = 3, 0.08
READ, DEPTH = 2 * 2**20, 8  # bytes and number of concurrent reads, like the engine's
Experts = list[tuple["Weight", "Weight", "Weight"]]


def measure_kernels(done: Callable[[], None] = lambda: None) -> list[KernelRate]:
    """Measure gated MLPs in each format of MEASURED at each of ROWS; ``done`` is called after each."""
    import torch

    found = []
    for name in MEASURED:
        experts = _experts(name)
        for rows in ROWS:
            speeds = [_products(experts, rows, SECONDS) for _ in range(ROUNDS + 1)]
            found.append(KernelRate(name, rows, torch.get_num_threads(), spread(speeds[1:])))
            done()
    return found


def measure_beside(files: Sequence[Path], rows: int, seconds: float = 1.0) -> tuple[float, float]:
    """The shares of their own speed that arithmetic with ``rows`` rows and the disk keep when they run together.

    They are measured alone and together by turns. Raises OSError if ``files`` cannot be read with O_DIRECT.
    """
    experts = _experts("bf16")
    shares: tuple[list[float], list[float]] = ([], [])
    each = seconds / ROUNDS / 3
    with _Reads(files) as reads:
        for _ in range(ROUNDS):
            alone = _products(experts, rows, each)
            disk, began = reads.count, time.perf_counter()
            with reads.running():
                time.sleep(each)
            disk_alone = (reads.count - disk) / (time.perf_counter() - began)
            disk, began = reads.count, time.perf_counter()
            with reads.running():
                together = _products(experts, rows, each)
            disk_together = (reads.count - disk) / (time.perf_counter() - began)
            shares[0].append(min(1.0, together / alone))
            shares[1].append(min(1.0, disk_together / disk_alone))
    return max(0.05, spread(shares[0]).median), max(0.05, spread(shares[1]).median)


class Stream:
    """The arithmetic of one token in one layer of a large model."""

    def __init__(self) -> None:
        self._experts = _experts("int4")
        self._turn = itertools.cycle(range(0, len(self._experts) - TOGETHER + 1, TOGETHER))

    def run(self) -> None:
        """Compute the next experts, which evicts everything else from the caches."""
        import torch

        from tierlm.kernels import gated_mlps

        at = next(self._turn)
        x, outputs = torch.ones(1, HIDDEN), torch.empty(TOGETHER, 1, HIDDEN)
        gated_mlps([(x, y, e) for y, e in zip(outputs, self._experts[at : at + TOGETHER], strict=True)])


def measure_unpacking() -> dict[str, Spread]:
    """Decompressed bytes a second of zstd on all cores, for the exponent bytes of bfloat16 weights; empty without the
    package zstandard."""
    try:
        import zstandard
    except ImportError:
        return {}
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    weights = np.random.default_rng(0).normal(0, 0.02, 2**22).astype(np.float32)
    plane = (weights.view(np.uint32) >> 23).astype(np.uint8).tobytes()
    packed = zstandard.ZstdCompressor(level=3).compress(plane)
    threads = len(os.sched_getaffinity(0))

    def decompress(_: int) -> int:
        return len(zstandard.ZstdDecompressor().decompress(packed))

    speeds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            total = sum(pool.map(decompress, range(4 * threads)))
            speeds.append(total / (time.perf_counter() - began))
    return {f"zstd, bfloat16 exponents, {len(plane) / len(packed):.1f}:1": spread(speeds)}


def measure_links() -> tuple[dict[str, Spread], int]:
    """The rates of an accelerator's links, memory and matrix products by name, and its memory in bytes; empty and 0
    without an accelerator."""
    import torch

    if not torch.accelerator.is_available():
        return {}, 0
    device = torch.accelerator.current_accelerator()
    nbytes = 256 * 2**20
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    twin = torch.empty_like(there)
    pinned, pageable = (torch.ones(nbytes, dtype=torch.uint8, pin_memory=pin) for pin in (True, False))
    square = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    actions: dict[str, tuple[Callable[[], object], float]] = {
        "pinned to device": (lambda: there.copy_(pinned, non_blocking=True), nbytes),
        "device to pinned": (lambda: pinned.copy_(there, non_blocking=True), nbytes),
        "pageable to device": (lambda: there.copy_(pageable), nbytes),
        "device to pageable": (lambda: pageable.copy_(there), nbytes),
        "device memory": (lambda: twin.copy_(there), 2 * nbytes),
        "device products": (lambda: square @ square, 4096**3),
    }
    found = {}
    for name, (action, amount) in actions.items():
        speeds = []
        for _ in range(ROUNDS + 1):
            torch.accelerator.synchronize()
            began = time.perf_counter()
            for _ in range(4):
                action()
            torch.accelerator.synchronize()
            speeds.append(4 * amount / (time.perf_counter() - began))
        found[name] = spread(speeds[1:])
    return found, int(torch.get_device_module(device).mem_get_info(device)[1])


def _experts(name: str) -> Experts:
    """Copies of one expert in the format ``name``, in huge pages like the engine's slots."""
    import torch

    from tierlm.kernels import Weight, quantise

    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Weight:
        if FORMATS[name].packable:
            return quantise(torch.randn(shape, generator=generator).mul_(0.02), name)
        _, stored = FORMATS[name].parts(shape)[""]
        return Weight(torch.zeros(stored, dtype=torch.uint8), name, None, shape)  # its values do not matter for speed

    made = [make(*shape) for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    parts = [part for weight in made for part in (weight.data, weight.scale) if part is not None]
    size = sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts)
    count = max(TOGETHER, min(RESIDENT, available_ram() // 4) // size)
    slab = torch.frombuffer(host_memory(count * size), dtype=torch.uint8)
    at = 0

    def copy(part: Tensor) -> Tensor:
        nonlocal at
        place = slab[at : at + part.nbytes].view(part.dtype).view(part.shape)
        at += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        return place.copy_(part)

    def placed(weight: Weight) -> Weight:
        scale = None if weight.scale is None else copy(weight.scale)
        return Weight(copy(weight.data), name, scale, weight.shape)

    return [(placed(made[0]), placed(made[1]), placed(made[2])) for _ in range(count)]


def _products(experts: Experts, rows: int, seconds: float) -> float:
    """Multiply-adds a second of gated MLPs with ``rows`` rows, cycling through ``experts``: one row in TOGETHER experts
    at once, as in decode; more rows in one expert at a time, as in prefill."""
    import torch

    from tierlm.kernels import gated_mlps

    together = TOGETHER if rows == 1 else 1
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(0))
    outputs = [torch.empty(rows, HIDDEN) for _ in range(together)]
    turn = itertools.cycle(range(0, len(experts) - together + 1, together))
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        at = next(turn)
        gated_mlps([(x, y, expert) for y, expert in zip(outputs, experts[at : at + together], strict=True)])
        steps += 1
    return steps * together * 3 * HIDDEN * WIDTH * rows / (time.perf_counter() - began)


class _Reads:
    """DEPTH threads that read random places of some files while ``running``."""

    def __init__(self, files: Sequence[Path]):
        large = [file for file in files if file.stat().st_size > READ]
        self._files = [(os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size) for file in large]
        self._counts = [0] * DEPTH
        self._memory = memoryview(host_memory(DEPTH * READ))
        self._stop = threading.Event()

    @property
    def count(self) -> int:
        """Bytes read so far."""
        return sum(self._counts)

    def __enter__(self) -> _Reads:
        return self

    def __exit__(self, *_: Any) -> None:
        for fd, _size in self._files:
            os.close(fd)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._stop.clear()
        threads = [threading.Thread(target=self._read, args=(lane,)) for lane in range(DEPTH)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _read(self, lane: int) -> None:
        buffer = self._memory[lane * READ : (lane + 1) * READ]
        while not self._stop.is_set():
            fd, size = random.choice(self._files)
            self._counts[lane] += os.preadv(fd, [buffer], random.randrange((size - READ) // 4096 + 1) * 4096)
