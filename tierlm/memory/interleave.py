"""Host memory spread over NUMA nodes."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Collection

MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call
INTERLEAVE = 3  # MPOL_INTERLEAVE of linux/mempolicy.h
WORD = 64  # bits of a word of the mask


def interleave(address: int, nbytes: int, nodes: Collection[int], call: Callable[..., int] | None = None) -> bool:
    """Place pages that nobody has written yet on ``nodes`` by turns, so that threads of every node use the memory of
    all. ``address``: page-aligned. ``call``: the C function ``syscall``.

    False with one node, and where the system knows no such call or refuses it, as some containers do: then a page lies
    on the node whose thread writes it first.
    """
    number = MBIND.get(platform.machine())
    if len(nodes) < 2 or number is None:
        return False
    words = max(nodes) // WORD + 1
    mask = (ctypes.c_uint64 * words)()
    for node in nodes:
        mask[node // WORD] |= 1 << node % WORD
    call = ctypes.CDLL(None).syscall if call is None else call
    arguments = ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_long(INTERLEAVE), mask
    # The kernel reads one bit less than it is told.
    return call(ctypes.c_long(number), *arguments, ctypes.c_ulong(WORD * words + 1), ctypes.c_long(0)) == 0
