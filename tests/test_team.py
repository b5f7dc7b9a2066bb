"""The kernels' threads: the same bits at every count, from several callers at once, and in a forked process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
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


def compute_threads() -> int:
    names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    return sum(name.exists() and name.read_text() == "tierlm-compute\n" for name in names)


# Each of many loops runs each piece once, and ends in every thread when all pieces have run. Then all threads come to a
# call whose pieces wait for them, though helpers sleep between calls.
PROGRAM = r"""
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "pool.h"

using namespace std::chrono_literals;

int main() {
    for (int threads = 1; threads <= 5; ++threads)
        for (const int64_t count : {0, 1, 2, 7, 500}) {
            std::vector<std::atomic<int64_t>> runs(count);
            std::atomic<int64_t> early{0};
            for (int call = 0; call < 40; ++call)
                together(threads, [&](Team& team) {
                    for (int loop = call * 25; loop < call * 25 + 25; ++loop) {
                        for (const int64_t piece : team.share(count)) {
                            early += runs[(piece + 1) % count] < loop;
                            if (piece == loop % count && loop % 50 == 0) std::this_thread::sleep_for(200us);
                            ++runs[piece];
                        }
                        for (const auto& ran : runs) early += ran <= loop;
                    }
                });
            for (const auto& ran : runs)
                if (ran != 1000) return printf("%d threads ran a piece %d times\n", threads, int(ran)), 1;
            if (early) return printf("%d threads left a loop before it ended\n", threads), 1;
        }
    for (int call = 0; call < 5; ++call) {
        std::this_thread::sleep_for(5ms);
        std::atomic<int> inside{0};
        std::atomic<bool> alone{false};
        const auto until = std::chrono::steady_clock::now() + 20s;
        together(5, [&](Team& team) {
            for (const int64_t piece : team.share(5)) {
                static_cast<void>(piece);
                ++inside;
                while (inside < 5 && !alone) {
                    std::this_thread::sleep_for(100us);
                    if (std::chrono::steady_clock::now() > until) alone = true;
                }
            }
        });
        if (alone) return printf("not all threads came\n"), 1;
    }
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_team_runs_each_piece_once_in_the_order_of_loops(tmp_path: Path) -> None:
    folder, program = Path(native.__file__).parent, tmp_path / "team"
    (tmp_path / "team.cpp").write_text(PROGRAM)
    sources = [tmp_path / "team.cpp", folder / "pool.cpp"]
    subprocess.run(["c++", "-std=c++17", "-O1", "-pthread", f"-I{folder}", *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")


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
    """Its copy of the helpers has no threads: it starts others."""
    x, weight = operands(20000)
    expected, ended = linear(x, weight), list[int]()

    def work() -> None:
        torch.set_num_threads(3)
        assert same(linear(x, weight), expected)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends it, should it wait for helpers
            right = same(linear(x, weight), expected)
            os._exit(0 if right and compute_threads() == 2 else 1)
        ended.append(os.waitpid(child, 0)[1])

    thread = threading.Thread(target=work)
    try:
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(1)
    assert ended == [0]
