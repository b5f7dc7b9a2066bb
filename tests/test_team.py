"""The kernels' threads: the same bits at every count, from several callers at once, and in a forked process."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tierlm.kernels import Weight, linear, native

pytestmark = pytest.mark.skipif(native.load() is None, reason="not built: there was no C++ compiler")


def operands(outs: int, ins: int = 96, rows: int = 3) -> tuple[Tensor, Weight]:
    generator = torch.Generator().manual_seed(outs)
    matrix = torch.randn(outs, ins, generator=generator).bfloat16()
    return torch.randn(rows, ins, generator=generator), Weight(matrix, "bf16", None, (outs, ins))


def same(found: Tensor, expected: Tensor) -> bool:
    """Without torch's threads: in a forked process they hang."""
    return found.numpy().tobytes() == expected.numpy().tobytes()


def test_counts_that_change_from_call_to_call_give_the_same_bits() -> None:
    cases = [operands(outs) for outs in (1, 700, 5000, 20000)]
    expected = [linear(*case) for case in cases]
    try:
        for turn in range(200):
            torch.set_num_threads(1 + turn % 7)
            x, weight = cases[turn % 4]
            assert same(linear(x, weight), expected[turn % 4])
    finally:
        torch.set_num_threads(1)


def test_callers_at_once_have_helpers_of_their_own_that_end_with_them() -> None:
    def compute_threads() -> int:
        names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
        return sum(name.exists() and name.read_text() == "tierlm-compute\n" for name in names)

    before, (x, weight) = compute_threads(), operands(20000)
    expected, wrong, seen = linear(x, weight), list[int](), list[int]()
    barrier = threading.Barrier(3)

    def work() -> None:
        torch.set_num_threads(3)
        for turn in range(50):
            if not same(linear(x, weight), expected):
                wrong.append(turn)
        barrier.wait()
        seen.append(compute_threads())
        barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(1)
    assert (wrong, seen) == ([], [before + 6] * 3)
    until = time.monotonic() + 30
    while compute_threads() > before and time.monotonic() < until:  # they end after Python's thread has
        time.sleep(0.01)
    assert compute_threads() == before


def test_a_forked_process_computes_and_ends() -> None:
    """Its copy of the helpers has no threads to wait for."""
    x, weight = operands(20000)
    expected, ended = linear(x, weight), list[int]()

    def work() -> None:
        torch.set_num_threads(3)
        assert same(linear(x, weight), expected)
        child = os.fork()
        if child == 0:
            os._exit(0 if same(linear(x, weight), expected) else 1)
        ended.append(os.waitpid(child, 0)[1])

    thread = threading.Thread(target=work)
    try:
        thread.start()
        thread.join(60)
    finally:
        torch.set_num_threads(1)
    assert ended == [0]
