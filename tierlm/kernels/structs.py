"""The structs that C++ takes, as it declares them: numbers and pointers of 64 bits each.

Calls pack them as lists of words, in this order, which is cheaper than fields by name. ``native.load`` compares these
declarations with C++'s.
"""

from __future__ import annotations

import ctypes


def fields(words: str, kind: type = ctypes.c_int64) -> list[tuple[str, type]]:
    """Several of one type, by their names."""
    return [(name, kind) for name in words.split()]


class Matrix(ctypes.Structure):
    """``Weight.operand``."""

    _fields_ = fields("format data scale outs ins")


class Expert(ctypes.Structure):
    """Packed by ``Native.gated_mlps``."""

    _fields_ = [*fields("x"), *fields("gate up down", Matrix), *fields("y rows")]


class Attention(ctypes.Structure):
    """Packed by kernels/attention.py."""

    _fields_ = [
        *fields("query_a query_b key_value_a key_value_b output norm query_norm latent_norm next_norm", Matrix),
        *fields("heads nope rope value interleaved cache_format cache places cosine sine hidden sum normed rows"),
    ]


class Router(ctypes.Structure):
    """Packed by kernels/routing.py."""

    _fields_ = [
        *fields("gate bias norm", Matrix),
        *fields("softmax groups groups_chosen normalize chosen x rows weights experts"),
    ]
