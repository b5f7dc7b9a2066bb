"""Kills a running generation at random moments, with heat, trace and timeline on: nothing may be lost or wrong.

    python bench/kill_storm.py --kills 50

After each kill the user's files are whole, old or new; the next run that ends works, gives the same tokens and leaves
nothing beside them. Every second kill is SIGKILL, the others SIGTERM. Exit code 1 if anything is wrong. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tierlm.tracing.traceforms import read_trace

PROMPT = [5, 9, 200, 31]
OURS = {"cache", "timeline.json", "trace.npz"}


def generate(folder: Path, told: Connection) -> None:
    """A run that writes all its files at the end. Tells when it has loaded, its tokens, and that it has ended."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    from tierlm import LLM, Budget, SamplingParams

    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    options = {"timeline": folder / "timeline.json", "trace": folder / "trace.npz"}
    with LLM.load("demo", budget=Budget("2GiB"), context=64, ram_slots=24, **options) as llm:  # type: ignore[arg-type]
        told.send("loaded")
        told.send(llm.generate([PROMPT], params)[0].ids)
    told.send("ended")


class Storm:
    """Runs in ``folder``, each in its own process, which has imported everything beforehand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tierlm.llm"])

    def begin(self) -> tuple[ForkServerProcess, Connection]:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=generate, args=(self.folder, there))
        process.start()
        there.close()
        return process, here

    def run(self) -> tuple[list[int], float]:
        """The tokens of a run that nobody disturbs, and the seconds from its load to its end."""
        process, told = self.begin()
        assert told.recv() == "loaded"
        began, ids = time.monotonic(), told.recv()
        assert told.recv() == "ended"
        seconds = time.monotonic() - began
        process.join()
        assert process.exitcode == 0, process.exitcode
        return ids, seconds

    def kill(self, number: int, after: float) -> None:
        """A run that is killed ``after`` seconds from its load."""
        process, told = self.begin()
        assert told.recv() == "loaded"
        time.sleep(after)
        process.kill() if number % 2 else process.terminate()
        process.join()

    def check(self) -> None:
        """Raise an error if a file is not whole."""
        for file in [self.folder / "timeline.json", *(self.folder / "cache" / "tierlm" / "heat").glob("*.json")]:
            json.loads(file.read_text())  # raises ValueError
        read_trace(self.folder / "trace.npz")  # raises TraceError

    def left_over(self) -> list[str]:
        """What lies beside the files, in words."""
        found = [f"{name} is left over" for name in os.listdir(self.folder) if name not in OURS]
        beside = [file for file in (self.folder / "cache").rglob("*") if file.name.startswith(".")]
        return found + [f"{file} is left over" for file in beside]


def storm(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill ``kills`` runs in ``folder``. Returns what is wrong, in words."""
    runs, moments = Storm(folder), random.Random(seed)
    expected, seconds = runs.run()
    found = runs.left_over()
    for number in range(kills):
        runs.kill(number, moments.uniform(0.0, 1.1 * seconds))
        runs.check()
    ids, _ = runs.run()
    if ids != expected:
        found.append(f"expected the tokens {expected}, found {ids}")
    runs.check()
    return found + runs.left_over()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = storm(Path(folder), args.kills, args.seed)
    print("\n".join(found))
    print(json.dumps({"kills": args.kills, "wrong": len(found)}))
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
