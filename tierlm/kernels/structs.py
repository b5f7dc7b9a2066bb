"""The structs passed to C++, declared as there. Every field is a 64-bit integer or pointer.

Calls pack them as lists of words in this order, which is faster than setting fields. ``native.load`` compares these
declarations with those in C++.
"""

from __future__ import annotations

import ctypes


def fields(words: str, kind: type = ctypes.c_int64) -> list[tuple[str, type]]:
    """Several fields of one type."""
    return [(name, kind) for name in words.split()]


class Matrix(ctypes.Structure):
    """``Weight.operand``."""

    _fields_ = fields("format data scale outs ins extra")


class Expert(ctypes.Structure):
    """Packed by ``Native.gated_mlps``."""

    _fields_ = [*fields("x"), *fields("gate up down", Matrix), *fields("y rows")]


class Attention(ctypes.Structure):
    """Packed by kernels/attention.py."""

    _fields_ = [
        *fields("query_a query_b key_value_a key_value_b value_b output norm query_norm latent_norm next_norm", Matrix),
        *fields("heads nope rope value interleaved cache_format cache places cosine sine hidden sum normed rows"),
    ]


class Grouped(ctypes.Structure):
    """Packed by kernels/grouped_attention.py."""

    _fields_ = [
        *fields("query key value output norm query_norm key_norm output_norm next_norm", Matrix),
        *fields("query_bias key_bias value_bias output_bias sinks", Matrix),
        *fields("heads kv_heads dim rotated interleaved whole_norm zero_centred window cache_format"),
        *fields("cache places cosine sine hidden sum normed rows"),
    ]


class Chunk(ctypes.Structure):
    """Packed by kernels/chunk.py, as LatentChunk is."""

    _fields_ = [
        *fields("queries keys values sinks out cache_format pitch key_group value_group"),
        *fields("groups sharing key_dim value_dim past tokens window"),
    ]


class LatentChunk(ctypes.Structure):
    _fields_ = [
        *fields("queries to_keys to_values key_head key_out key_in value_head value_out value_in"),
        *fields("cache out cache_format heads all_heads nope rope rank value past tokens"),
    ]


class Router(ctypes.Structure):
    """Packed by kernels/routing.py."""

    _fields_ = [
        *fields("gate bias norm", Matrix),
        *fields("softmax groups groups_chosen normalize chosen x rows weights experts"),
    ]
