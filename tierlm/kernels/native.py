"""The compiled kernels, called through ctypes, which lets other threads run meanwhile."""

from __future__ import annotations

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
MAX_ROWS = 64  # above it, widening a tile and a matrix product are faster


class Native:
    """The library and its threads: as many as torch's own."""

    def __init__(self, file: Path):
        self._library = ctypes.CDLL(str(file))
        self._library.tierlm_pool_new.restype = ctypes.c_void_p
        self._library.tierlm_pool_free.argtypes = [ctypes.c_void_p]
        self._library.tierlm_linear.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int,
            *[ctypes.c_void_p] * 4,
            *[ctypes.c_int64] * 4,
        ]
        self._library.tierlm_widen_float8.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2]
        self._pools: dict[int, int] = {}

    def linear(self, x: Tensor, data: Tensor, scale: Tensor | None) -> Tensor:
        """``x @ w.T``: contiguous float32 [T, in] and w [out, in] as stored -> float32 [T, out]."""
        rows, ins = x.shape
        out = x.new_empty(rows, data.shape[0])
        self._library.tierlm_linear(
            self._pool(torch.get_num_threads()),
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
        pool = self._pool(torch.get_num_threads())
        self._library.tierlm_widen_float8(pool, data.data_ptr(), scale.data_ptr(), out.data_ptr(), ins, outs)
        return out

    def _pool(self, threads: int) -> int:
        if threads not in self._pools:
            self._pools[threads] = self._library.tierlm_pool_new(threads)
        return self._pools[threads]


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
