"""Slabs on several NUMA nodes, with a made-up system call; and the real one."""

from __future__ import annotations

import ctypes
import mmap
import platform
from typing import Any

import pytest

from tierlm.memory.interleave import MBIND, interleave

pytestmark = pytest.mark.skipif(platform.machine() not in MBIND, reason="the number of the system call is not known")


def test_one_call_names_all_nodes() -> None:
    calls: list[list[Any]] = []

    def call(*given: Any) -> int:
        calls.append([list(value) if isinstance(value, ctypes.Array) else value.value for value in given])
        return -len(calls) + 1

    assert interleave(4096, 8192, [0, 2, 65], call)
    assert calls == [[MBIND[platform.machine()], 4096, 8192, 3, [0b101, 0b10], 129, 0]]
    assert not interleave(4096, 8192, [0, 1], call)  # refused


def test_one_node_needs_no_call() -> None:
    def call(*given: Any) -> int:
        raise AssertionError(given)

    assert not interleave(4096, 8192, [0], call)


def test_the_system_takes_the_arguments_or_refuses_and_the_memory_works() -> None:
    memory = mmap.mmap(-1, 16 * mmap.PAGESIZE)
    address = ctypes.addressof(view := ctypes.c_char.from_buffer(memory))
    assert interleave(address, len(memory), [0, 1]) in (True, False)  # this machine may have one node
    memory[:] = b"x" * len(memory)
    del view
    memory.close()
