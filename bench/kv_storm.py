"""Kills a process that writes KV blocks, at random moments: the store stays whole, and no token is wrong.

    python bench/kv_storm.py --kills 20

Each process first asks for a prompt that an earlier one has stored, then for new ones, which push out old blocks, until
it is killed. Writes are slowed down, so that most kills come in the middle of one. After each kill every block that has
a header is read and checked. Exit code 1 if anything is wrong. The last line is JSON.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
import xxhash

from tierlm.checkpoints.hub import find_model
from tierlm.memory import kvfiles
from tierlm.memory.kvblock import NAME, BlockLayout
from tierlm.memory.kvfiles import FIELDS, HEADER, Header
from tierlm.models.catalog import Catalog

SIZE = 4 * 2**20  # bytes of the store, less than all prompts need
PIECE = 16 * 2**10  # bytes
PREFIX, LENGTH = 320, 600  # tokens that prompts share, and of each
SILENT = 120.0  # seconds without a word after which a process hangs


def slow_write(fd: int, data: memoryview, offset: int) -> None:
    """FAKE: a disk that takes 4 ms for each piece of 16 KiB."""
    for at in range(0, data.nbytes, PIECE):
        os.pwritev(fd, [data[at : at + PIECE]], offset + at)
        time.sleep(0.004)


def prompt(number: int) -> list[int]:
    ids = random.Random(0)
    shared = [ids.randrange(2, 3000) for _ in range(PREFIX)]
    ids = random.Random(number)
    return [*shared, *(ids.randrange(2, 3000) for _ in range(LENGTH - PREFIX))]


def ask(folder: Path | None, numbers: list[int], told: Connection) -> None:
    """Answer prompts. Tells the tokens of each, and what the first has found on disk; at last None."""
    from tierlm import LLM, Budget, SamplingParams
    from tierlm.engine.sequence import Keep

    faulthandler.enable()
    kvfiles._write = slow_write
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    options: Any = {} if folder is None else {"kv_disk": SIZE, "kv_folder": folder}
    with LLM.load("demo", budget=Budget("2GiB"), context=1000, threads=1, heat=False, **options) as llm:
        for number in numbers:
            pieces = llm.stream(prompt(number), params, keep=Keep())
            ids = [token for piece in pieces for token in piece.ids]
            kv = llm.stats().kv.get("disk")
            told.send((number, ids, 0 if kv is None else kv.hit_bytes, 0 if kv is None else kv.damaged))
    told.send(None)


class Storm:
    """Processes with one store in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tierlm.llm"])

    def begin(self, folder: Path | None, numbers: list[int]) -> tuple[ForkServerProcess, Connection]:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=ask, args=(folder, numbers, there))
        process.start()
        there.close()
        return process, here

    def run(self, folder: Path | None, numbers: list[int]) -> dict[int, list[int]]:
        """The tokens of prompts, from a process that nobody disturbs."""
        process, told = self.begin(folder, numbers)
        found = {number: ids for number, ids, _, _ in iter(lambda: hear(process, told), None)}
        process.join(SILENT)
        if process.exitcode is None:
            abort(process)
        return found

    def blocks(self) -> tuple[int, int, int]:
        """Blocks that have a header, how many of them are not what it says, and erased headers."""
        (file,), (blocks,) = self.folder.glob("*/headers"), self.folder.glob("*/blocks")
        content, size, wrong = file.read_bytes(), block_bytes(), 0
        rows = {at: content[at * HEADER :][:HEADER] for at in range(len(content) // HEADER)}
        owner = next((FIELDS.unpack_from(row)[1] for row in rows.values() if any(row)), bytes(NAME))
        headers = {at: header for at, row in rows.items() if (header := Header.unpack(row, owner)) is not None}
        with blocks.open("rb") as stream:
            for at, header in headers.items():
                stream.seek(at * size)
                wrong += xxhash.xxh3_64_intdigest(stream.read(size)) != header.checksum
        return len(headers), wrong, len(rows) - len(headers)


def hear(process: ForkServerProcess, told: Connection) -> Any:
    """What the process tells next. Raises EOFError if it has ended, TimeoutError if it hangs."""
    if not told.poll(SILENT):
        abort(process)
    return told.recv()


def abort(process: ForkServerProcess) -> NoReturn:
    """End a process that hangs. It prints the stacks of its threads."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGABRT)
    process.join()
    raise TimeoutError(f"process {process.pid} hangs: expected a word within {SILENT:g} s; its stacks are above")


def block_bytes() -> int:
    """Bytes of a block of the demo model on disk."""
    widths = [layer.attention.cache_width for layer in Catalog(find_model("demo")).spec.layers]
    return BlockLayout.of(widths, torch.float32, "exact").stored


def storm(folder: Path, kills: int, seed: int, prompts: int) -> dict[str, Any]:
    """Kill ``kills`` processes with a store in ``folder`` that answer some of ``prompts``. Returns what was found;
    ``wrong``, in words."""
    runs, draw, wrong, hits, whole = Storm(folder), random.Random(seed), list[str](), list[int](), list[int]()
    cut = 0  # kills in the middle of a write
    expected = runs.run(None, list(range(prompts)))
    runs.run(folder, [0])
    for kill in range(kills):
        process, told = runs.begin(folder, [0, *(draw.randrange(1, prompts) for _ in range(1000))])
        end, first = None, True
        while end is None or time.monotonic() < end:
            if end is None or told.poll(max(0.0, end - time.monotonic())):
                number, ids, hit_bytes, damaged = hear(process, told)
                if first:
                    hits.append(hit_bytes)
                    first, end = False, time.monotonic() + draw.uniform(0.0, 2.0)
                if ids != expected[number]:
                    wrong.append(f"kill {kill}: prompt {number}: expected the tokens {expected[number]}, found {ids}")
                if damaged:
                    wrong.append(f"kill {kill}: {damaged} tokens damaged")
        process.kill()
        process.join()
        found, damaged, erased = runs.blocks()
        whole.append(found)
        cut += erased > 0
        if damaged:
            wrong.append(f"kill {kill}: {damaged} of {found} blocks are not what their headers say")
    wrong += [f"kill {kill}: nothing was found on disk" for kill, found in enumerate(hits) if not found]
    return {"kills": kills, "wrong": wrong, "in_a_write": cut, "hit_bytes": hits, "blocks": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=30, help="different ones")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = storm(Path(folder), arguments.kills, arguments.seed, arguments.prompts)
    print("\n".join(found["wrong"]))
    print(json.dumps(found))
    if found["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
