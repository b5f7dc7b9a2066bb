"""The compiled kernels, called through ctypes, which lets other threads run meanwhile."""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
MAX_ROWS = 64  # above it, widening a tile and a matrix product are faster


class Native:
    """The library. It uses as many threads as torch."""

    def __init__(self, file: Path):
        library = ctypes.CDLL(str(file))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._linear, self._widen = library.tierlm_linear, library.tierlm_widen_float8
        self._mlps = library.tierlm_gated_mlps
        self._into, self._from = library.tierlm_into_latent, library.tierlm_from_latent
        self._linear.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 4, *[size] * 4]
        self._widen.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 2]
        self._mlps.argtypes = [ctypes.c_int, ctypes.c_int, pointer, *[size] * 3]
        self._into.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 4, *[size] * 8]
        self._from.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 4, *[size] * 6]

    def linear(self, x: Tensor, data: Tensor, scale: Tensor | None) -> Tensor:
        """``x @ w.T``: contiguous float32 [T, in] and w [out, in] as stored -> float32 [T, out]."""
        rows, ins = x.shape
        out = x.new_empty(rows, data.shape[0])
        self._linear(
            torch.get_num_threads(),
            FORMATS[data.dtype],
            x.data_ptr(),
            data.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            out.data_ptr(),
            rows,
            ins,
            data.shape[0],
            out.stride(0),
        )
        return out

    def widen(self, data: Tensor, scale: Tensor) -> Tensor:
        """Block-scaled float8 [out, in] -> float32 [out, in]. The first row is the first of a block of scales."""
        outs, ins = data.shape
        out = torch.empty(outs, ins)
        self._widen(torch.get_num_threads(), data.data_ptr(), scale.data_ptr(), out.data_ptr(), ins, outs)
        return out

    def gated_mlps(self, jobs: Sequence[tuple[Tensor, Tensor, Sequence[tuple[Tensor, Tensor | None]]]]) -> None:
        """Several ``y = down(silu(gate(x)) * up(x))`` at once, of one format and shape.

        A job: x and y, contiguous float32 [T, hidden], and the gate, up (both [width, hidden]) and down
        [hidden, width] with their scales. y is written.
        """
        gate = jobs[0][2][0][0]
        width, hidden = gate.shape
        rows = sum(len(x) for x, _, _ in jobs)
        scratch = torch.empty(2, rows, width)
        inner, other = scratch.data_ptr(), scratch[1].data_ptr()
        fields: list[int] = []
        for x, y, weights in jobs:
            fields.append(x.data_ptr())
            fields += [data.data_ptr() for data, _ in weights]
            fields += [0 if scale is None else scale.data_ptr() for _, scale in weights]
            fields += [inner, other, y.data_ptr(), len(x)]
            inner, other = inner + len(x) * width * 4, other + len(x) * width * 4
        experts = (ctypes.c_int64 * len(fields))(*fields)
        self._mlps(torch.get_num_threads(), FORMATS[gate.dtype], experts, len(jobs), hidden, width)

    def into_latent(self, q: Tensor, data: Tensor, scale: Tensor | None, first: int, heads: int) -> Tensor:
        """float32 q [T, g, nope], dense over the last dimension, times the key half of the heads from ``first`` on of
        kv_b [heads * (nope + value), rank] as stored -> float32 [g, T, rank]."""
        rows, group, nope = q.shape
        out = torch.empty(group, rows, data.shape[1])
        self._into(
            *self._call(q, data, scale, out),
            rows,
            first,
            group,
            nope,
            len(data) // heads,
            *data.shape[1:],
            *q.stride()[:2],
        )
        return out

    def from_latent(
        self, mixed: Tensor, data: Tensor, scale: Tensor | None, first: int, heads: int, value: int
    ) -> Tensor:
        """Contiguous float32 mixed [g, T, rank] times the value half of the heads from ``first`` on -> float32
        [T, g, value]."""
        group, rows, rank = mixed.shape
        out = torch.empty(rows, group, value)
        self._from(*self._call(mixed, data, scale, out), rows, first, group, value, len(data) // heads, rank)
        return out

    def _call(self, x: Tensor, data: Tensor, scale: Tensor | None, out: Tensor) -> tuple[int, ...]:
        pointers = x.data_ptr(), data.data_ptr(), 0 if scale is None else scale.data_ptr(), out.data_ptr()
        return torch.get_num_threads(), FORMATS[data.dtype], *pointers


@cache
def load() -> Native | None:
    """The compiled kernels, or None where they were not built: without a compiler, torch does their work."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(__file__).parent / f"_native{suffix}"
        if file.exists():
            return Native(file)
    return None


def kernels_for(data: Tensor, scale: Tensor | None) -> Native | None:
    """The compiled kernels, if they exist and know this weight."""
    known = data.device.type == "cpu" and data.dtype in FORMATS and (scale is not None) == (data.dtype.itemsize == 1)
    plain = data.dim() == 2 and data.is_contiguous() and (scale is None or scale.is_contiguous())
    return load() if known and plain else None
