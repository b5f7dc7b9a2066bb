"""tierlm beside llama.cpp and transformers + accelerate: the same weights, prompt, cgroup, disk and machine.

    python bench/synthetic.py deepseek-v2-lite /data/v2l --skew 0.5 --stickiness 0.35 --gguf /data/v2l.gguf
    python bench/peers.py /data/v2l --gguf /data/v2l.gguf --ram 4GiB 8GiB --rounds 3

Every run is a process in its own memory cgroup, after the page cache was dropped. Peers alternate; each round runs them
all, and moves the first to the end. tierlm and accelerate read the folder in place, llama.cpp maps the GGUF twin. All
get the same ids and decode greedily. Load and start-to-first-token count from the start of the process. Decode runs
from the first new token to the last; its bytes are those that the block device delivered meanwhile, to all processes,
and those that the process itself requested. The peak includes cached pages, which fill any cgroup smaller than the
mapped file. A probe of the disk's ceiling precedes each round (bench/disk.py). A note says how many tokens all engines
have in common; texts part at a tie within rounding, and soon if an engine computes something else (bench/noise.py).

MODEL may be a GGUF file, which tierlm and llama.cpp then both read.

"tierlm" runs as at its first start; "tierlm-again" has run once before and knows the most used experts.
"llama.cpp-repacked" copies quantised weights into the layout of its fastest kernels, if memory holds them all.

A peer that fails at one size is not tried again there; the table says why. The last line is JSON, with every run. Exit
codes: 0 success, 1 nothing could be measured, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disk import disk_ceiling, drop_page_cache, weights_of
from limited import available, run_limited
from peer_runs import PEERS, Request
from rich.console import Console
from rich.table import Table

import tierlm
from tierlm.config import format_size, parse_size
from tierlm.errors import UsageError

TIERLM = Path(tierlm.__file__).parent.parent
COLUMNS = {
    "tokens_per_second": ("decode\ntokens/s", 1.0, 2),
    "bytes_per_token": ("by the disk\nMB/token", 1e-6, 0),
    "own_bytes_per_token": ("by the process\nMB/token", 1e-6, 0),
    "hit_rate": ("hit rate\n%", 100.0, 0),
    "ceiling_share": ("of the disk's\nceiling %", 100.0, 0),
    "first_token_seconds": ("TTFT\ns", 1.0, 2),
    "import_seconds": ("imports\ns", 1.0, 2),
    "load_seconds": ("start to\nloaded s", 1.0, 2),
    "start_to_first_token_seconds": ("start to first\ntoken s", 1.0, 2),
    "peak": ("peak of cgroup\nGiB, with cache", 2**-30, 2),
}
Run = dict[str, Any]  # the result of a peer's runner and the cgroup's peak; or {"failed": why}


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median and range, for people."""
    middle, least, most = (f"{scale * f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} [{least}-{most}]" if len(values) > 1 else middle


def run_peer(request: dict[str, Any], timeout: float, cache: str) -> Run:
    """One run in its own process and cgroup; ``request`` has the fields of a Request except the last two. The process
    imports this process's tierlm, even if another is installed."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TIERLM), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(request["threads"]),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": cache,  # heat lives for this comparison only
    }
    try:
        with tempfile.TemporaryDirectory(prefix="offload-", dir=Path(request["model"]).resolve().parent) as scratch:
            sent = request | {"scratch": scratch, "started": time.monotonic()}
            process, report = run_limited(
                [sys.executable, __file__, "--one", json.dumps(sent)],
                request["ram"],
                capture_output=True,
                timeout=timeout,
                env=os.environ | environment,
            )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:g} s"}
    except OSError as error:
        return {"failed": str(error)}
    if report["killed"]:
        return {"failed": "killed for memory"}
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [""]
        return {"failed": f"{lines[-1][:160]} (exit code {process.returncode})"}
    result: Run = json.loads(process.stdout.splitlines()[-1])
    return result | {"peak": report["peak"]}


def run_one(text: str) -> None:
    """The child: run the parent's request, and print the result as the last line."""
    fields = json.loads(text)
    paths = {name: Path(fields[name]) for name in ("model", "gguf", "scratch") if fields[name] is not None}
    request = Request(**(fields | paths))
    print(json.dumps(PEERS[request.peer](request)))


def ratios(own: list[Run], other: list[Run]) -> list[float]:
    """tierlm's decode speed over a peer's, round by round."""
    pairs = zip(own, other, strict=False)
    return [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs if "failed" not in a | b]


def common_start(texts: list[list[int]]) -> int:
    """With how many ids all ``texts`` begin alike."""
    return len(list(itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False))))


def summary(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Median, least and most of each column over the completed runs."""
    done = [run for run in runs if "failed" not in run]
    if not done:
        return {}
    return {
        name: {"median": statistics.median(v), "least": min(v), "most": max(v)}
        for name in COLUMNS
        if (v := [run[name] for run in done if name in run])
    }


def table_of(title: str, cases: dict[tuple[str, str], list[Run]]) -> Table:
    """``cases``: (ram, peer) -> its runs by round."""
    table = Table(title=title, caption="medians [least-most]", caption_justify="left")
    for column in ("ram", "peer", *(head for head, _, _ in COLUMNS.values()), "tierlm is\nfaster by"):
        table.add_column(column)
    table.add_column("runs", min_width=24, overflow="fold")
    for (ram, peer), runs in cases.items():
        done = [run for run in runs if "failed" not in run]
        why = next((run["failed"] for run in runs if "failed" in run), None)
        cells = []
        for name, (_, scale, digits) in COLUMNS.items():
            values = [run[name] for run in done if name in run]
            cells.append(spread(values, scale, digits) if values else "-")
        quotients = ratios(cases.get((ram, "tierlm"), []), runs)
        ratio = spread(quotients) if quotients and peer != "tierlm" else "-"
        table.add_row(ram, peer, *cells, ratio, f"{len(done)}" + (f"; {why}" if why else ""))
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same weights for llama.cpp")
    parser.add_argument("--ram", nargs="+", default=["4GiB"], help="size of the cgroup, and tierlm's budget")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["tierlm", "llama.cpp", "accelerate"])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--peer-tokens", nargs="+", default=[], metavar="PEER=N", help="fewer for a slow one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between the load and the request")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a run")
    args = parser.parse_args()
    try:
        args.limits = {ram: parse_size(ram, "--ram") for ram in args.ram}
    except UsageError as error:
        parser.error(str(error))
    args.counts = dict.fromkeys(args.peers, args.tokens)
    for text in args.peer_tokens:
        peer, _, count = text.partition("=")
        if peer not in args.peers or not count.isdigit():
            parser.error(f"--peer-tokens: expected one of {', '.join(args.peers)}, =, and a number; found {text!r}")
        args.counts[peer] = int(count)
    if min(args.counts.values()) < 2 or min(args.prompt_tokens, args.rounds, args.threads) < 1:
        parser.error("at least two tokens, and one of anything else")
    alone = args.model.suffix == ".gguf"
    if alone:
        args.gguf = args.gguf or args.model
    for path in filter(None, (args.model if alone else args.model / "config.json", args.gguf)):
        if not path.exists():
            parser.error(f"{path}: no such file")
    return args


@dataclass
class Measured:
    """``cases``: (ram, peer) -> its runs by round. ``ceilings``: bytes a second into small and huge pages, by round."""

    fixed: dict[str, Any]
    cases: dict[tuple[str, str], list[Run]]
    ceilings: list[tuple[float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def measure_round(args: argparse.Namespace, turn: int, found: Measured, files: list[Path], cache: str) -> None:
    """The disk's ceiling, and each case once; another case begins each round."""
    ceiling = None
    try:
        found.ceilings.append(disk_ceiling(args.model))
        ceiling = found.ceilings[-1][1]
    except ValueError as error:
        found.note(f"the disk's ceiling was not measured: {error}")
    first = turn % len(found.cases)
    for (ram, peer), runs in [*found.cases.items()][first:] + [*found.cases.items()][:first]:
        if any("failed" in run for run in runs):
            continue
        found.note(drop_page_cache(files))
        request = found.fixed | {"peer": peer, "ram": args.limits[ram], "tokens": args.counts[peer]}
        run = run_peer(request, args.timeout, cache)
        if ceiling is not None and "failed" not in run:
            run["ceiling_share"] = run["own_bytes_per_token"] * run["tokens_per_second"] / ceiling
        runs.append(run)
        told = run.get("failed") or f"{run['tokens_per_second']:.2f} tokens/s"
        print(f"round {turn + 1}, {ram}, {peer}: {told}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> Measured:
    """All runs, round by round."""
    gguf = args.gguf.resolve() if args.gguf else None
    files = list(dict.fromkeys([*weights_of(args.model.resolve()), *filter(None, [gguf])]))
    fixed: dict[str, Any] = {"model": str(args.model.resolve()), "gguf": str(gguf) if gguf else None}
    fixed |= {"threads": args.threads, "pause": args.pause, "prompt": list(range(5, 5 + args.prompt_tokens))}
    found = Measured(fixed, {(ram, peer): [] for ram in args.ram for peer in args.peers})
    with tempfile.TemporaryDirectory() as cache:
        if "tierlm-again" in args.peers:
            request = fixed | {"peer": "tierlm-again", "ram": max(args.limits.values()), "tokens": 4 * args.tokens}
            run_peer(request, args.timeout, cache)
        for turn in range(args.rounds):
            measure_round(args, turn, found, files, cache)
    known = [run["ids"] for runs in found.cases.values() for run in runs if -1 not in run.get("ids", [-1])]
    if known:
        found.note(f"all decoded the same first {common_start(known)} of {min(map(len, known))} tokens")
    return found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        run_one(sys.argv[2])
        return
    args = parse_arguments()
    if not available():
        sys.exit("memory cgroups cannot be made here (that takes root); without them no two runs have the same memory")
    found = measure(args)
    sizes = {}
    if args.model.is_dir():
        sizes["folder"] = sum(file.stat().st_size for file in weights_of(args.model))
    if args.gguf:
        sizes["GGUF"] = args.gguf.stat().st_size
    told = ", ".join(f"{name} {format_size(size)}" for name, size in sizes.items())
    title = f"{args.model.name} ({told}), {args.prompt_tokens} tokens of prompt, {args.rounds} rounds interleaved"
    console = Console(width=200)
    console.print(table_of(title, found.cases))
    if found.ceilings:
        first, again = ([speeds[i] for speeds in found.ceilings] for i in (0, 1))
        console.print(
            f"disk's ceiling, random direct reads into huge pages: {spread(again, 1e-9)} GB/s; into small pages: "
            f"{spread(first, 1e-9)} GB/s"
        )
    for note in found.notes:
        console.print(f"note: {note}")
    cases = [
        {"ram": ram, "peer": peer, "summary": summary(runs), "runs": runs}
        | {"tierlm_over_peer": ratios(found.cases.get((ram, "tierlm"), []), runs)}
        for (ram, peer), runs in found.cases.items()
    ]
    options = found.fixed | {"tokens": args.counts, "rounds": args.rounds}
    print(json.dumps({"options": options, "disk": found.ceilings, "notes": found.notes, "cases": cases}))
    if not any(case["summary"] for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
