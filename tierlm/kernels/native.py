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
    """The library. It uses as many threads as torch."""

    def __init__(self, file: Path):
        library = ctypes.CDLL(str(file))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._linear, self._widen = library.tierlm_linear, library.tierlm_widen_float8
        self._linear.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 4, *[size] * 4]
        self._widen.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 2]

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
