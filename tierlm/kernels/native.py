"""The compiled kernels, called through ctypes, which releases the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from struct import Struct, pack

import torch
from torch import Tensor

from tierlm.kernels import structs
from tierlm.kernels.weight import Weight
from tierlm.library import check_layout, find_library

# These structs have many fields: too few words are an error, not reads past their end.
_ATTENTION, _GROUPED, _CHUNK, _LATENT_CHUNK = (
    Struct(f"{ctypes.sizeof(kind) // 8}q")
    for kind in (structs.Attention, structs.Grouped, structs.Chunk, structs.LatentChunk)
)
MAX_ROWS = 64  # with more rows of float32 activations, torch is faster on a widened tile, but see Native.fast


class Native:
    """The compiled library. It uses as many threads as torch."""

    def __init__(self, file: Path):
        library = ctypes.CDLL(str(file))
        passed = structs.Matrix, structs.Expert, structs.Attention, structs.Grouped, structs.Router
        for struct in (*passed, structs.Chunk, structs.LatentChunk):
            check_layout(library, struct)
        self._library, pointer, size = library, ctypes.c_void_p, ctypes.c_int64
        library.tierlm_linear.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 2]
        library.tierlm_widen.argtypes = [ctypes.c_int, *[pointer] * 2]
        library.tierlm_quantise.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 3, *[size] * 2]
        library.tierlm_gated_mlps.argtypes = [ctypes.c_int, pointer, size]
        library.tierlm_into_latent.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 7]
        library.tierlm_from_latent.argtypes = [ctypes.c_int, *[pointer] * 3, *[size] * 5]
        library.tierlm_attention.argtypes = [ctypes.c_int, pointer, *[ctypes.c_double] * 3]
        library.tierlm_grouped_attention.argtypes = [ctypes.c_int, pointer, *[ctypes.c_double] * 2]
        library.tierlm_chunk.argtypes = [ctypes.c_int, pointer, ctypes.c_double]
        library.tierlm_latent_chunk.argtypes = [ctypes.c_int, pointer, ctypes.c_double]
        library.tierlm_route.argtypes = [pointer, size, *[ctypes.c_double] * 2]
        library.tierlm_grouped.argtypes = [*[pointer] * 3, *[size] * 2, pointer]
        library.tierlm_grouped.restype = size
        library.tierlm_combine.argtypes = [*[pointer] * 6, *[size] * 3]
        library.tierlm_fast.argtypes = [pointer]

    def fast(self, weight: Weight, rows: int) -> bool:
        """Whether ``linear`` is faster than torch for this many rows."""
        return rows <= MAX_ROWS or bool(self._library.tierlm_fast(_words(weight.operand)))

    def linear(self, x: Tensor, weight: Weight, out: Tensor) -> None:
        """``out = x @ weight.T``: contiguous float32 [T, in] -> float32 [T, out], dense in its last dimension."""
        pointers = x.data_ptr(), out.data_ptr()
        self._library.tierlm_linear(
            torch.get_num_threads(), _words(weight.operand), *pointers, x.shape[0], out.stride(0)
        )

    def widen(self, weight: Weight) -> Tensor:
        """A weight with scales as float32 [out, in]. Its first row begins a block of scales."""
        out = torch.empty(weight.shape)
        self._library.tierlm_widen(torch.get_num_threads(), _words(weight.operand), out.data_ptr())
        return out

    def quantise(self, weight: Tensor, made: Weight) -> None:
        """Quantise a finite, contiguous float32 matrix into the uninitialised tiles and scales of ``made``."""
        assert made.scale is not None
        pointers = weight.data_ptr(), made.data.data_ptr(), made.scale.data_ptr()
        self._library.tierlm_quantise(torch.get_num_threads(), made.format == "int4", *pointers, *weight.shape[::-1])

    def gated_mlps(self, jobs: Sequence[tuple[Tensor, Tensor, Sequence[Weight]]]) -> None:
        """Several ``y = down(silu(gate(x)) * up(x))`` at once, packed as structs.Expert. Writes y.

        A job: x and y, contiguous float32 [T, hidden]; gate, up [width, hidden] and down [hidden, width].
        """
        words: list[int] = []
        for x, y, (gate, up, down) in jobs:
            words += (x.data_ptr(), *gate.operand, *up.operand, *down.operand, y.data_ptr(), x.shape[0])
        self._library.tierlm_gated_mlps(torch.get_num_threads(), _words(words), len(jobs))

    def into_latent(self, q: Tensor, kv_b: Weight, first: int, heads: int) -> Tensor:
        """float32 q [T, g, nope], dense in its last dimension, times the key half of kv_b [heads * (nope + value),
        rank], for heads starting at ``first`` -> float32 [g, T, rank]."""
        rows, group, nope = q.shape
        outs, rank = kv_b.shape
        out = torch.empty(group, rows, rank)
        arguments = q.data_ptr(), out.data_ptr(), rows, first, group, nope, outs // heads, *q.stride()[:2]
        self._library.tierlm_into_latent(torch.get_num_threads(), _words(kv_b.operand), *arguments)
        return out

    def from_latent(self, mixed: Tensor, kv_b: Weight, first: int, heads: int, value: int) -> Tensor:
        """Contiguous float32 mixed [g, T, rank], never rounded, times the value half of kv_b, for heads starting at
        ``first`` -> float32 [T, g, value]."""
        group, rows, _ = mixed.shape
        out = torch.empty(rows, group, value)
        arguments = mixed.data_ptr(), out.data_ptr(), rows, first, group, value, kv_b.shape[0] // heads
        self._library.tierlm_from_latent(torch.get_num_threads(), _words(kv_b.operand), *arguments)
        return out

    def attention(self, words: Sequence[int], eps: float, inner_eps: float, scale: float) -> None:
        """``words``: a structs.Attention, packed by kernels/attention.py."""
        self._library.tierlm_attention(torch.get_num_threads(), _ATTENTION.pack(*words), eps, inner_eps, scale)

    def grouped_attention(self, words: Sequence[int], eps: float, scale: float) -> None:
        """``words``: a structs.Grouped, packed by kernels/grouped_attention.py."""
        self._library.tierlm_grouped_attention(torch.get_num_threads(), _GROUPED.pack(*words), eps, scale)

    def chunk(self, words: Sequence[int], scale: float) -> None:
        """``words``: a structs.Chunk, packed by kernels/chunk.py."""
        self._library.tierlm_chunk(torch.get_num_threads(), _CHUNK.pack(*words), scale)

    def latent_chunk(self, words: Sequence[int], scale: float) -> None:
        """``words``: a structs.LatentChunk, packed by kernels/chunk.py."""
        self._library.tierlm_latent_chunk(torch.get_num_threads(), _LATENT_CHUNK.pack(*words), scale)

    def route(self, words: Sequence[int], count: int, eps: float, scale: float) -> None:
        """``words``: ``count`` structs.Router, packed by kernels/routing.py."""
        self._library.tierlm_route(_words(words), count, eps, scale)

    def grouped(self, pointers: Sequence[int], pairs: int, count: int) -> tuple[list[int], list[int]]:
        """``kernels.grouped``: distinct ids and their counts. ``pointers``: ids, order and inverse."""
        most = min(pairs, count)
        heads = (ctypes.c_int64 * (2 * most))()
        found = self._library.tierlm_grouped(*pointers, pairs, count, heads)
        return heads[:found], heads[most : most + found]

    def combine(self, pointers: Sequence[int], shape: Sequence[int], chosen: int) -> None:
        """``kernels.combined``. ``pointers``: hidden, shared (0: none), weights, outputs, inverse, result."""
        self._library.tierlm_combine(*pointers, *shape, chosen)


@cache
def load() -> Native | None:
    """The compiled kernels, or None if they were not built; torch replaces them."""
    file = find_library(Path(__file__).parent)
    return None if file is None else Native(file)


def kernels_for(weight: Weight) -> Native | None:
    """The compiled kernels, if they exist and support this weight."""
    return load() if weight.plain else None


def _words(words: Sequence[int]) -> bytes:
    """Fields of structs in kernels/structs.py. A ctypes array would make a type at each call, which takes longer."""
    return pack(f"{len(words)}q", *words)
