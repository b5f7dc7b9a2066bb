"""The structs that C++ takes, as it declares them: numbers and pointers of 64 bits each.

Calls pack them as lists of words, which is cheaper than fields by name. ``native.load`` compares these declarations
with C++'s; whoever packs keeps their order.
"""

from __future__ import annotations

import ctypes

WORD = ctypes.c_int64


class Matrix(ctypes.Structure):
    """team.h. ``Weight.operand``."""

    _fields_ = [(name, WORD) for name in ("format", "data", "scale", "outs", "ins")]


class Expert(ctypes.Structure):
    """native.cpp. Packed by ``Native.gated_mlps``."""

    _fields_ = [
        ("x", WORD),
        *((name, Matrix) for name in ("gate", "up", "down")),
        *((name, WORD) for name in ("y", "rows")),
    ]


class Attention(ctypes.Structure):
    """attention.cpp. Packed by kernels/attention.py."""

    _matrices = ("query_a", "query_b", "key_value_a", "key_value_b", "output")
    _norms = ("norm", "query_norm", "latent_norm", "next_norm")
    _numbers = ("heads", "nope", "rope", "value", "interleaved", "cache_format")
    _arrays = ("cache", "places", "cosine", "sine", "hidden", "sum", "normed")
    _fields_ = [
        *((name, Matrix) for name in (*_matrices, *_norms)),
        *((name, WORD) for name in (*_numbers, *_arrays, "rows")),
    ]


class Router(ctypes.Structure):
    """routing.cpp. Packed by kernels/routing.py."""

    _fields_ = [
        *((name, Matrix) for name in ("gate", "bias", "norm")),
        *((name, WORD) for name in ("softmax", "groups", "groups_chosen", "normalize", "chosen")),
        *((name, WORD) for name in ("x", "rows", "weights", "experts")),
    ]


ALL = (Matrix, Expert, Attention, Router)
