"""Kernel rates, beside memory speed and beside llama.cpp on the same shapes.

    python bench/kernels.py [--formats int4 int8 bf16 q4_k] [--rounds 5]

Three tasks of DeepSeek-V2-Lite, on weights larger than any cache: a matrix and one row; a token's six experts; 512
tokens over half of a layer's experts. Each format alternates with the llama.cpp type of nearly the same size: int4 with
Q4_0, repacked for the processor; int8 with Q8_0; bf16 with BF16. A format of GGUF alternates with itself, the experts'
width rounded up to whole blocks. Rates are multiplications of a weight, G weights/s, medians and ranges of the rounds;
so the share of the memory's speed applies to one row only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ggml import Ggml
from rich.console import Console
from rich.table import Table

from tierlm.formats import FORMATS
from tierlm.formats.ggml import GGML
from tierlm.kernels import Weight, gated_mlps, linear
from tierlm.kernels.quantised import quantise

HIDDEN, WIDTH, EXPERTS, CHOSEN, PROMPT = 2048, 1408, 32, 6, 512  # half of a layer's 64 experts, to save memory
HEAD = 16384  # rows of the matrix: an eighth of a large vocabulary
PEERS = {"int4": "Q4_0", "int8": "Q8_0", "bf16": "BF16"}
PEERS |= {format.name: format.dtype for format in GGML}
SECONDS = 0.4  # of a round


def width_of(format: str) -> int:
    """WIDTH, rounded up to whole blocks."""
    block = FORMATS[format].block[1]
    return -(-WIDTH // block) * block


def copies_of(ggml: Ggml, matrix: torch.Tensor, format: str, copies: int) -> list[Weight]:
    """``copies`` copies of one matrix."""
    if FORMATS[format].packable:
        made = quantise(matrix, format)
    else:
        data = torch.from_numpy(ggml.quantised(FORMATS[format].dtype, matrix))
        made = Weight(data.view(len(matrix), -1), format, None, tuple(matrix.shape))
    scales = [None if made.scale is None else made.scale.clone() for _ in range(copies)]
    return [Weight(made.data.clone(), made.format, scale, made.shape) for scale in scales]


def choices(generator: torch.Generator, tokens: int) -> torch.Tensor:
    """int32 [tokens, CHOSEN], no repetition within a row."""
    return torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :CHOSEN].int()


class Ours:
    """The kernels' side of a format."""

    def __init__(self, ggml: Ggml, format: str, generator: torch.Generator):
        head = copies_of(ggml, torch.randn(HEAD, HIDDEN, generator=generator) / 50, format, 8)
        width = width_of(format)
        gate, down = (torch.randn(n, m, generator=generator) / 50 for n, m in ((width, HIDDEN), (HIDDEN, width)))
        parts = [copies_of(ggml, part, format, EXPERTS) for part in (gate, gate, down)]
        self.heads = itertools.cycle(head)
        experts = list(zip(*parts, strict=True))
        self.steps = {n: itertools.cycle([self._step(experts, n, generator) for _ in range(8)]) for n in (1, PROMPT)}

    @staticmethod
    def _step(experts: list[tuple[Weight, ...]], tokens: int, generator: torch.Generator) -> list[Any]:
        x, chosen = torch.randn(tokens, HIDDEN), choices(generator, tokens)
        rows = [(x[(chosen == expert).any(1)], expert) for expert in chosen.unique().tolist()]
        return [(mine, torch.empty_like(mine), experts[expert]) for mine, expert in rows]

    def matrix(self) -> None:
        linear(torch.ones(1, HIDDEN), next(self.heads))

    def experts_of(self, tokens: int) -> None:
        gated_mlps(next(self.steps[tokens]))


class Theirs:
    """llama.cpp's side: the same matrices, each operation a node of a graph made in advance."""

    def __init__(self, ggml: Ggml, format: str, generator: torch.Generator):
        self.ggml, type = ggml, PEERS[format]
        repacked = type == "Q4_0"  # this version repacks no other type for AVX2
        head, width = torch.randn(HEAD, HIDDEN, generator=generator) / 50, width_of(format)
        gate, down = (torch.randn(n, m, generator=generator) / 50 for n, m in ((width, HIDDEN), (HIDDEN, width)))
        self.gate, self.up, self.down = (ggml.weights(type, part, EXPERTS, repacked) for part in (gate, gate, down))
        matrices = [self._matrix(ggml.weights(type, head, 1, repacked)) for _ in range(8)]
        self.matrices = itertools.cycle(matrices)
        steps = {n: [self._experts(n, generator) for _ in range(8)] for n in (1, PROMPT)}
        self.steps = {n: itertools.cycle(graphs) for n, graphs in steps.items()}

    def _matrix(self, weight: int) -> int:
        context = self.ggml.context()
        x = self.ggml.tensor(context, "F32", HIDDEN)
        graph = self.ggml.graph(context, self.ggml.call("mul_mat", context, weight, x))
        self.ggml.set(x, np.ones(HIDDEN, np.float32))
        return graph

    def _experts(self, tokens: int, generator: torch.Generator) -> int:
        call, context = self.ggml.call, self.ggml.context()
        x = self.ggml.tensor(context, "F32", HIDDEN, 1, tokens)
        ids = self.ggml.tensor(context, "I32", CHOSEN, tokens)
        gate = call("silu", context, call("mul_mat_id", context, self.gate, x, ids))
        inner = call("mul", context, gate, call("mul_mat_id", context, self.up, x, ids))
        graph = self.ggml.graph(context, call("mul_mat_id", context, self.down, inner, ids))
        self.ggml.set(x, torch.randn(tokens, HIDDEN).numpy())
        self.ggml.set(ids, choices(generator, tokens).numpy())
        return graph

    def matrix(self) -> None:
        self.ggml.compute(next(self.matrices))

    def experts_of(self, tokens: int) -> None:
        self.ggml.compute(next(self.steps[tokens]))


def rate(work: Callable[[], object], amount: float) -> float:
    """``amount`` times the runs a second; one run precedes the timing."""
    work()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        work()
        count += 1
    return amount * count / (time.perf_counter() - began)


def memory_speed(slab: torch.Tensor) -> float:
    """Bytes/s of reading ``slab``, float32 [n], with all threads: the faster of two ways."""
    one, matrix = torch.ones(1, 2**13), Weight(slab.view(-1, 2**13), "f32")
    ways: list[Callable[[], object]] = [slab.sum, lambda: linear(one, matrix)]
    return max(rate(way, slab.nbytes) for way in ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    ggml, slab = Ggml(torch.get_num_threads()), torch.ones(2**27)
    rows = []
    for format in args.formats:
        expert = 3 * HIDDEN * width_of(format)
        work = {
            "matrix, 1 row": (lambda side: side.matrix, HEAD * HIDDEN),
            "6 experts, 1 row": (lambda side: lambda: side.experts_of(1), CHOSEN * expert),
            f"{EXPERTS} experts, {PROMPT} rows": (
                lambda side: lambda: side.experts_of(PROMPT),
                PROMPT * CHOSEN * expert,
            ),
        }
        ours = Ours(ggml, format, torch.Generator().manual_seed(0))
        theirs = Theirs(ggml, format, torch.Generator().manual_seed(0))
        found: dict[str, list[list[float]]] = {name: [[], []] for name in work}
        ram = []
        for _ in range(args.rounds):
            ram.append(memory_speed(slab))
            for name, (run_of, amount) in work.items():
                for side, rates in zip((ours, theirs), found[name], strict=True):
                    rates.append(rate(run_of(side), amount))
        limit = statistics.median(ram) * 8 / FORMATS[format].bits
        for name, (mine, other) in found.items():
            ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
            share = statistics.median(mine) / limit if name.endswith("1 row") else None
            rows.append({"format": format, "work": name, "ours": mine, "theirs": other, "ratio": ratio,
                         "ram": ram, "share_of_ram": share})  # fmt: skip
        del ours, theirs
        ggml.release()

    console, table = Console(width=150), Table("format", "work", "tierlm", "llama.cpp", "ratio", "share of RAM's speed")
    console.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for row in rows:
        cells = [f"{statistics.median(v) / 1e9:.1f} [{min(v) / 1e9:.1f}-{max(v) / 1e9:.1f}]"
                 for v in (row["ours"], row["theirs"])]  # fmt: skip
        share = "" if row["share_of_ram"] is None else f"{row['share_of_ram']:.0%}"
        table.add_row(row["format"], row["work"], *cells, f"{row['ratio']:.2f}", share)
    console.print(table)
    speeds = [speed for row in rows for speed in row["ram"]]
    console.print(
        f"RAM read: {statistics.median(speeds) / 1e9:.1f} GB/s [{min(speeds) / 1e9:.1f}-{max(speeds) / 1e9:.1f}]"
    )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
