"""The compiled kernels, called through ctypes, which lets other threads run meanwhile."""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tierlm.kernels.weight import GROUP, Weight

FORMATS = {"f32": 0, "bf16": 1, "f16": 2, "fp8": 3, "int8": 4, "int4": 5}
EXACT = {"int8": 6, "int4": 7}
MAX_ROWS = 64  # above it, where activations are float32, widening a tile and a matrix product are faster
ROUNDED = 40  # bytes of a group of activations rounded to int8: struct Rounded in product.h


class Native:
    """The library. It uses as many threads as torch."""

    def __init__(self, file: Path):
        library = ctypes.CDLL(str(file))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._linear, self._widen = library.tierlm_linear, library.tierlm_widen
        self._mlps = library.tierlm_gated_mlps
        self._into, self._from = library.tierlm_into_latent, library.tierlm_from_latent
        self._quantise = library.tierlm_quantise
        self._quantise.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 3, *[size] * 2]
        self._linear.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 5, *[size] * 4]
        self._widen.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 3, *[size] * 2]
        self._mlps.argtypes = [ctypes.c_int, ctypes.c_int, pointer, *[size] * 3]
        self._into.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 4, *[size] * 8]
        self._from.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 4, *[size] * 6]

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """``x @ weight.T``: contiguous float32 [T, in] -> float32 [T, out]."""
        rows, ins = x.shape
        out = x.new_empty(rows, weight.shape[0])
        room = _room(weight, rows, ins)
        self._linear(*_call(x, weight, out), room.data_ptr(), rows, ins, weight.shape[0], out.stride(0))
        return out

    def widen(self, weight: Weight) -> Tensor:
        """A weight of a format with scales as float32 [out, in]. The first row is the first of a block of scales."""
        outs, ins = weight.shape
        out = torch.empty(outs, ins)
        threads, format, _, *pointers = _call(out, weight, out)
        self._widen(threads, format, *pointers, ins, outs)
        return out

    def quantise(self, weight: Tensor, made: Weight) -> None:
        """A finite, contiguous float32 matrix into the empty tiles and scales of ``made``, of its size."""
        assert made.scale is not None
        pointers = weight.data_ptr(), made.data.data_ptr(), made.scale.data_ptr()
        self._quantise(torch.get_num_threads(), made.format == "int4", *pointers, weight.shape[1], weight.shape[0])

    def gated_mlps(self, jobs: Sequence[tuple[Tensor, Tensor, Sequence[Weight]]]) -> None:
        """Several ``y = down(silu(gate(x)) * up(x))`` at once, of one format and shape.

        A job: x and y, contiguous float32 [T, hidden], and gate, up (both [width, hidden]) and down [hidden, width].
        y is written.
        """
        gate = jobs[0][2][0]
        width, hidden = gate.shape
        rows = sum(len(x) for x, _, _ in jobs)
        scratch = torch.empty(2, rows, width)
        outer, inner = _room(gate, rows, hidden), _room(gate, rows, width)
        starts = [scratch.data_ptr(), scratch[1].data_ptr(), outer.data_ptr(), inner.data_ptr()]
        steps = [4 * width, 4 * width, outer.shape[-1], inner.shape[-1]]  # bytes of a row of each
        fields: list[int] = []
        for x, y, weights in jobs:
            fields.append(x.data_ptr())
            fields += [weight.pointers[0] for weight in weights]
            fields += [weight.pointers[1] for weight in weights]
            fields += [*starts, y.data_ptr(), len(x)]
            starts = [start + len(x) * step for start, step in zip(starts, steps, strict=True)]
        experts = (ctypes.c_int64 * len(fields))(*fields)
        self._mlps(torch.get_num_threads(), _number(gate), experts, len(jobs), hidden, width)

    def into_latent(self, q: Tensor, kv_b: Weight, first: int, heads: int) -> Tensor:
        """float32 q [T, g, nope], dense over the last dimension, times the key half of the heads from ``first`` on of
        kv_b [heads * (nope + value), rank] as stored -> float32 [g, T, rank]."""
        rows, group, nope = q.shape
        outs, rank = kv_b.shape
        out = torch.empty(group, rows, rank)
        self._into(*_call(q, kv_b, out), rows, first, group, nope, outs // heads, rank, *q.stride()[:2])
        return out

    def from_latent(self, mixed: Tensor, kv_b: Weight, first: int, heads: int, value: int) -> Tensor:
        """Contiguous float32 mixed [g, T, rank] times the value half of the heads from ``first`` on -> float32
        [T, g, value]. ``mixed`` is never rounded."""
        group, rows, rank = mixed.shape
        out = torch.empty(rows, group, value)
        per_head = kv_b.shape[0] // heads
        self._from(*_call(mixed, replace(kv_b, exact=True), out), rows, first, group, value, per_head, rank)
        return out


@cache
def load() -> Native | None:
    """The compiled kernels, or None where they were not built: without a compiler, torch does their work."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(__file__).parent / f"_native{suffix}"
        if file.exists():
            return Native(file)
    return None


def kernels_for(weight: Weight) -> Native | None:
    """The compiled kernels, if they exist and know this weight."""
    return load() if weight.plain else None


def _number(weight: Weight) -> int:
    return EXACT[weight.format] if weight.exact and weight.quantised else FORMATS[weight.format]


def _room(weight: Weight, rows: int, ins: int) -> Tensor:
    """Scratch for ``rows`` of activations, if products with ``weight`` round them: uint8 [rows, bytes of one]."""
    return torch.empty(rows if weight.rounds else 0, -(-ins // GROUP) * ROUNDED, dtype=torch.uint8)


def _call(x: Tensor, weight: Weight, out: Tensor) -> tuple[int, ...]:
    return torch.get_num_threads(), _number(weight), x.data_ptr(), *weight.pointers, out.data_ptr()
