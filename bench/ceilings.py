"""Compare `tierlm profile` with other tools, in alternation: disks with fio, RAM with a C++ loop.

    python bench/ceilings.py FOLDER --rounds 5

fio must be installed. It reads the same files at random with the profile's size, depth and pattern, O_DIRECT and
libaio. Both read new places each time, since the last ones may be in a cache of the disk or its host. The first
comparison uses 4 KiB pages on both sides, the second huge pages; fio takes them from hugetlbfs, which needs enough free
ones (as root: echo 64 > /proc/sys/vm/nr_hugepages). g++ compiles bench/stream.cpp. Reports medians of the rounds and of
the rounds' ratios; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tierlm.profiling.bandwidth import BLOCK, measure_memory
from tierlm.profiling.storage import Cell, files_of, measure_disk

CELLS = ((4 * 2**20, 8), (2**20, 8), (8 * 2**20, 4), (2**20, 1), (256 * 1024, 4))
SECONDS, TIMES = 1.0, 4  # of a fio run; our runs, which take a quarter of that each


def fio(files: list[Path], size: int, depth: int, huge: bool) -> float:
    """Bytes a second."""
    command = ["fio", "--name=x", "--rw=randread", "--direct=1", f"--bs={size}", f"--iodepth={depth}",
               "--ioengine=libaio", "--randrepeat=0", "--time_based", f"--runtime={SECONDS}", "--norandommap",
               "--output-format=json", "--file_service_type=random", "--readonly",
               f"--filename={':'.join(map(str, files))}"]  # fmt: skip
    done = subprocess.run(command + ["--iomem=mmaphuge"] * huge, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def free_huge_pages() -> int:
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows.get("HugePages_Free", "0"))


def stream(program: Path, threads: int) -> list[float]:
    copied = BLOCK // 2 // 2**20 * threads  # a thread of the profile copies from one half of its block to the other
    done = subprocess.run([program, str(copied), str(threads), "6"], capture_output=True, text=True, check=True)
    rows = [[float(value) for value in line.split()] for line in done.stdout.splitlines()[1:]]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pairs: dict[str, tuple[list[float], list[float]]] = {}

    def add(what: str, ours: float, theirs: float) -> None:
        mine, others = pairs.setdefault(what, ([], []))
        mine.append(ours)
        others.append(theirs)

    if shutil.which("fio"):
        with files_of(args.folder) as files:
            for turn in range(args.rounds):
                for size, depth in CELLS:
                    for huge in (False, True):
                        if huge and free_huge_pages() * 2**21 < size * depth + 2**22:
                            continue
                        cell = Cell("direct", "random", size, depth)

                        def ours(cell: Cell = cell, huge: bool = huge) -> float:
                            found = [measure_disk(args.folder, [cell], SECONDS, huge=huge)[0] for _ in range(TIMES)]
                            return statistics.median(rate.rate.median for rate in found)

                        if turn % 2:
                            theirs = fio(files, size, depth, huge)
                            mine = ours()
                        else:
                            mine = ours()
                            theirs = fio(files, size, depth, huge)
                        add(f"disk {size // 1024} KiB x {depth}, {'huge' if huge else '4 KiB'} pages", mine, theirs)
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "stream"
        source = Path(__file__).with_name("stream.cpp")
        subprocess.run(["g++", "-O3", "-march=native", "-fopenmp", source, "-o", program], check=True)
        for _ in range(args.rounds):
            memory = measure_memory()
            for threads in sorted({1, len(os.sched_getaffinity(0))}):
                theirs = stream(program, threads)
                rate = next(rate for rate in memory if (rate.name, rate.threads) == ("RAM", threads))
                for kind, other in zip(("read", "write", "copy"), theirs, strict=True):
                    add(f"RAM {kind}, {threads} cores", getattr(rate, kind).median, other)

    table = Table("what", "profile GB/s", "fio, C++ GB/s", "profile / other")
    for what, (mine, others) in pairs.items():
        shown = [f"{statistics.median(v) / 1e9:.2f} [{min(v) / 1e9:.2f}-{max(v) / 1e9:.2f}]" for v in (mine, others)]
        ratios = [one / other for one, other in zip(mine, others, strict=True)]
        table.add_row(what, *shown, f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]")
    Console(width=110).print(table)
    print(json.dumps(pairs))


if __name__ == "__main__":
    main()
