"""The compiled kernels, called through ctypes, which lets other threads run meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tierlm.kernels import structs
from tierlm.kernels.weight import Weight
from tierlm.library import check_layout, find_library

MAX_ROWS = 64  # above it, where activations are float32, widening a tile and a matrix product are faster


class Native:
    """The library. It uses as many threads as torch."""

    def __init__(self, file: Path):
        library = ctypes.CDLL(str(file))
        for struct in (structs.Matrix, structs.Expert, structs.Attention, structs.Router):
            check_layout(library, struct)
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._linear, self._widen = library.tierlm_linear, library.tierlm_widen
        self._mlps = library.tierlm_gated_mlps
        self._into, self._from = library.tierlm_into_latent, library.tierlm_from_latent
        self._quantise = library.tierlm_quantise
        self._attention = library.tierlm_attention
        self._quantise.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 3, *[size] * 2]
        self._linear.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 2]
        self._widen.argtypes = [ctypes.c_int, *[pointer] * 2]
        self._mlps.argtypes = [ctypes.c_int, pointer, size]
        self._into.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 7]
        self._from.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 5]
        self._attention.argtypes = [ctypes.c_int, pointer, *[ctypes.c_double] * 3]
        self._route, self._combine = library.tierlm_route, library.tierlm_combine
        self._route.argtypes = [pointer, size, *[ctypes.c_double] * 2]
        self._grouped = library.tierlm_grouped
        self._grouped.argtypes, self._grouped.restype = [*[pointer] * 3, *[size] * 2, pointer], size
        self._combine.argtypes = [*[pointer] * 6, *[size] * 3]

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """``x @ weight.T``: contiguous float32 [T, in] -> float32 [T, out]."""
        rows = x.shape[0]
        out = x.new_empty(rows, weight.operand[3])
        pointers = x.data_ptr(), out.data_ptr()
        self._linear(torch.get_num_threads(), _words(weight.operand), *pointers, rows, out.stride(0))
        return out

    def widen(self, weight: Weight) -> Tensor:
        """A weight of a format with scales as float32 [out, in]. The first row is the first of a block of scales."""
        out = torch.empty(weight.shape)
        self._widen(torch.get_num_threads(), _words(weight.operand), out.data_ptr())
        return out

    def quantise(self, weight: Tensor, made: Weight) -> None:
        """A finite, contiguous float32 matrix into the empty tiles and scales of ``made``, of its size."""
        assert made.scale is not None
        pointers = weight.data_ptr(), made.data.data_ptr(), made.scale.data_ptr()
        self._quantise(torch.get_num_threads(), made.format == "int4", *pointers, weight.shape[1], weight.shape[0])

    def gated_mlps(self, jobs: Sequence[tuple[Tensor, Tensor, Sequence[Weight]]]) -> None:
        """Several ``y = down(silu(gate(x)) * up(x))`` at once.

        A job: x and y, contiguous float32 [T, hidden], and gate, up (both [width, hidden]) and down [hidden, width].
        y is written. Packed as structs.Expert.
        """
        words: list[int] = []
        for x, y, (gate, up, down) in jobs:
            words += (x.data_ptr(), *gate.operand, *up.operand, *down.operand, y.data_ptr(), x.shape[0])
        self._mlps(torch.get_num_threads(), _words(words), len(jobs))

    def into_latent(self, q: Tensor, kv_b: Weight, first: int, heads: int) -> Tensor:
        """float32 q [T, g, nope], dense over the last dimension, times the key half of the heads from ``first`` on of
        kv_b [heads * (nope + value), rank] as stored -> float32 [g, T, rank]."""
        rows, group, nope = q.shape
        outs, rank = kv_b.shape
        out = torch.empty(group, rows, rank)
        sizes = rows, first, group, nope, outs // heads, *q.stride()[:2]
        self._into(torch.get_num_threads(), _words(kv_b.operand), q.data_ptr(), out.data_ptr(), *sizes)
        return out

    def from_latent(self, mixed: Tensor, kv_b: Weight, first: int, heads: int, value: int) -> Tensor:
        """Contiguous float32 mixed [g, T, rank] times the value half of the heads from ``first`` on -> float32
        [T, g, value]. ``mixed`` is never rounded."""
        group, rows, _ = mixed.shape
        out = torch.empty(rows, group, value)
        sizes = rows, first, group, value, kv_b.shape[0] // heads
        self._from(torch.get_num_threads(), _words(kv_b.operand), mixed.data_ptr(), out.data_ptr(), *sizes)
        return out

    def attention(self, words: Sequence[int], eps: float, inner_eps: float, scale: float) -> None:
        """``words``: of structs.Attention, as kernels/attention.py packs it."""
        self._attention(torch.get_num_threads(), _words(words), eps, inner_eps, scale)

    def route(self, words: Sequence[int], count: int, eps: float, scale: float) -> None:
        """``words``: of ``count`` structs.Router, as kernels/routing.py packs them."""
        self._route(_words(words), count, eps, scale)

    def grouped(self, pointers: Sequence[int], pairs: int, count: int) -> tuple[list[int], list[int]]:
        """``kernels.grouped``: the distinct ids and their counts; ``pointers``: the ids, the order and the inverse."""
        most = min(pairs, count)
        heads = (ctypes.c_int64 * (2 * most))()
        found = self._grouped(*pointers, pairs, count, heads)
        return heads[:found], heads[most : most + found]

    def combine(self, pointers: Sequence[int], shape: Sequence[int], chosen: int) -> None:
        """``kernels.combined``; ``pointers``: hidden, shared (0: none), weights, outputs, inverse and the result."""
        self._combine(*pointers, *shape, chosen)


@cache
def load() -> Native | None:
    """The compiled kernels, or None where they were not built: without a compiler, torch does their work."""
    file = find_library(Path(__file__).parent)
    return None if file is None else Native(file)


def kernels_for(weight: Weight) -> Native | None:
    """The compiled kernels, if they exist and know this weight."""
    return load() if weight.plain else None


def _words(words: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Structs of kernels/structs.py, field by field."""
    return (ctypes.c_int64 * len(words))(*words)
