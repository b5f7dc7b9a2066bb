"""Open-loop load on a server: requests come when they come, whether or not earlier ones have been answered.

    python bench/serve.py demo --ram 1GiB --rate 2 8 --seconds 20 --ttft 1 --tpot 0.1 --plot serve.png
    python bench/serve.py MODEL --ram 4GiB --rate 0.2 --peer llama-server --gguf FILE.gguf
    python bench/serve.py MODEL --ram 4GiB --arrivals AzureLLMInferenceTrace_conv.csv --speed 0.5 --longest 512 64
    python bench/serve.py --url http://127.0.0.1:8000 --rate 1

Arrivals are a Poisson process (--rate, --prompt, --output: medians), or come from a trace file (bench/arrivals.py).
Every request streams a greedy completion of ids and ignores the end of text. Times count from the moment when a request
was due. A request is good if it meets both targets, --ttft and --tpot; goodput is good requests a second of arrivals.

A server that the bench starts runs in a memory cgroup of --ram where possible. --peer runs the same load on llama.cpp's
server, or on a script with its options (bench/llamacpp_server.py), in a cgroup of the same size. --vanish N adds N
clients that connect and vanish at random moments; in the end the server must have no request left. --kill kills the
server in the middle of the arrivals and starts it again: what follows must have the tokens of a server at rest. Exit
code 1 if that does not hold. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from arrivals import Arrival, fitted, poisson, read_arrivals
from load import Load, all_gone, probe
from outcomes import summary
from rich.console import Console
from rich.table import Table
from served import Served, peer_server, tierlm_server

from tierlm.config import parse_size


async def measure(args: argparse.Namespace, url: str, arrivals: list[Arrival], served: Served | None) -> dict[str, Any]:
    """One run: the load, and what the modes add to it."""
    load = Load(url, args.name, args.timeout)
    expected, chance = await probe(load), random.Random(args.seed)
    seconds = args.seconds if args.arrivals is None else min(args.seconds, arrivals[-1].at) or args.seconds
    running = asyncio.create_task(load.run(arrivals))
    await asyncio.sleep(0)
    gone = [
        asyncio.create_task(
            load.vanish(Arrival(chance.uniform(0, seconds), args.prompt, args.output), -1 - number, number % 4)
        )
        for number in range(args.vanish)
    ]
    if args.kill:
        assert served is not None
        await asyncio.sleep(seconds / 2)
        served.kill()
        await asyncio.to_thread(served.start)
    outcomes = await running
    await asyncio.gather(*gone)
    found = summary(outcomes, seconds, args.ttft, args.tpot) | {"vanished": len(gone)}
    found["all_gone"], found["same_tokens"] = await all_gone(url), await probe(load) == expected
    found["outcomes"] = [[o.due, o.first, o.last, o.prompt, o.tokens, o.status] for o in outcomes]
    if served is not None:
        found["memory"] = [[at - load.began, nbytes] for at, nbytes in served.memory if at >= load.began]
        found["load_seconds"] = served.load_seconds
    await load.client.close()
    return found


def loads_of(args: argparse.Namespace) -> dict[str, list[Arrival]]:
    """The arrivals of each run, by name."""
    if args.arrivals is not None:
        found = fitted(read_arrivals(args.arrivals), args.speed, args.seconds, *args.longest)
        return {f"{args.arrivals.name} x {args.speed:g}": found}
    return {
        f"{rate:g}/s": fitted(
            poisson(rate, args.seconds, args.prompt, args.output, args.seed), 1.0, args.seconds, *args.longest
        )
        for rate in args.rate
    }


def run_server(args: argparse.Namespace, name: str, served: Served | None, url: str) -> list[dict[str, Any]]:
    """All runs on one server."""
    rows = []
    for load, arrivals in loads_of(args).items():
        if not arrivals:
            print(f"{load}: no request arrives in {args.seconds:g} s", file=sys.stderr)
            continue
        row = {"server": name, "load": load, **asyncio.run(measure(args, url, arrivals, served))}
        if served is not None:
            row |= {"cgroup": served.report()}
        rows.append(row)
        told = {what: row[what] for what in ("statuses", "goodput", "tokens_per_second", "ttft", "tpot")}
        print(f"{name}, {load}: {told}", file=sys.stderr, flush=True)
    return rows


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = ("server", "load", "requests", "ended", "TTFT s p50 / p90 / p99", "TPOT ms p50 / p90 / p99", "tokens/s")
    for column in (*columns, "prompt tokens/s", "goodput, share", "memory"):
        table.add_column(column)
    for row in rows:
        times = [
            "-"
            if row[name] is None
            else " / ".join(f"{scale * row[name][p]:.{digits}f}" for p in ("p50", "p90", "p99"))
            for name, scale, digits in (("ttft", 1, 2), ("tpot", 1000, 0))
        ]
        memory = [nbytes for _, nbytes in row.get("memory", ())]
        table.add_row(
            row["server"],
            row["load"],
            str(row["requests"]),
            ", ".join(f"{status} {count}" for status, count in row["statuses"].items()),
            *times,
            f"{row['tokens_per_second']:.1f}",
            f"{row['prompt_tokens_per_second']:.0f}",
            f"{row['goodput']:.2f}/s, {row['good_share']:.0%}",
            f"{memory[0] / 2**30:.2f} to {max(memory) / 2**30:.2f} GiB" if memory else "",
        )
    return table


def draw(file: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Over time: each request's wait for its first token, and the memory of the server."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (waits, memory) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for row, colour, marker in zip(rows, colours, "osD^vP", strict=False):
        done = [one for one in row["outcomes"] if one[5] == "ok"]
        label = f"{row['server']}, {row['load']}"
        waits.plot([one[0] for one in done], [one[1] - one[0] for one in done], marker, color=colour, label=label, ms=4)
        if samples := row.get("memory"):
            memory.plot([at for at, _ in samples], [nbytes / 2**30 for _, nbytes in samples], color=colour, label=label)
    waits.set(ylabel="seconds to the first token", yscale="log", title=title)
    memory.set(xlabel="seconds", ylabel="memory of the server, GiB", ylim=(0, None))
    for axes in (waits, memory):
        axes.grid(alpha=0.3)
    waits.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="what `tierlm serve` is to load; without it --peer runs alone")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--name", default="served", help="the model's id at --url")
    parser.add_argument("--ram", default="4GiB", help="tierlm's budget, and the memory cgroup")
    parser.add_argument("--context", type=int, default=4096, help="tokens of all requests")
    parser.add_argument(
        "--serve", nargs="+", default=[], metavar="OPTION", help="more of `tierlm serve`, as NAME=VALUE"
    )
    parser.add_argument("--peer", type=Path, help="llama.cpp's server, or a script with its options")
    parser.add_argument("--gguf", type=Path, help="the weights of the peer")
    parser.add_argument("--slots", type=int, default=8, help="sequences of the peer, which share the context")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0], help="arrivals a second")
    parser.add_argument("--arrivals", type=Path, help="a trace file instead: .jsonl is Mooncake's, others Azure's")
    parser.add_argument("--speed", type=float, default=1.0, help="of the trace file's time")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals")
    parser.add_argument("--prompt", type=int, default=48, help="median tokens")
    parser.add_argument("--output", type=int, default=24, help="median tokens")
    parser.add_argument("--longest", type=int, nargs=2, default=[512, 64], metavar=("PROMPT", "OUTPUT"))
    parser.add_argument("--ttft", type=float, default=5.0, help="target, seconds")
    parser.add_argument("--tpot", type=float, default=0.5, help="target, seconds a token")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a client waits")
    parser.add_argument("--vanish", type=int, default=0)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if (args.model is None and args.peer is None) is (args.url is None):
        parser.error("expected a model or a --peer to serve, or the --url of a server")
    if args.kill and args.url is not None:
        parser.error("--kill needs a server that the bench starts")
    if (args.peer is None) is not (args.gguf is None):
        parser.error("--peer and --gguf go together")
    if min(*args.rate, args.speed, args.seconds) <= 0 or min(args.prompt, args.output, *args.longest) < 1:
        parser.error("expected rates, speed and seconds above 0, and lengths of at least 1")
    parse_size(args.ram, "--ram")
    return args


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its server ends with it
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.url is not None:
            rows += run_server(args, args.url, None, args.url)
        else:
            commands = {}
            if args.model is not None:
                more = ["--context", str(args.context), *(f"--{option}" for option in args.serve)]
                commands["tierlm"] = tierlm_server(args.model, args.ram, more)
            if args.peer is not None:
                commands["llama.cpp"] = peer_server(args.peer, args.gguf, args.context, args.slots)
            for name, command in commands.items():
                with Served(command, args.ram, Path(folder) / f"{name}.log") as served:
                    rows += run_server(args, name, served, served.url)
    title = f"{args.model or args.gguf or args.url}: targets TTFT {args.ttft:g} s, TPOT {1000 * args.tpot:g} ms"
    Console(width=190).print(table_of(title, rows))
    if args.plot:
        draw(args.plot, title, rows)
    wrong = [f"{row['server']}, {row['load']}: other tokens than at rest" for row in rows if not row["same_tokens"]]
    wrong += [f"{row['server']}, {row['load']}: requests are left over" for row in rows if not row["all_gone"]]
    print("\n".join(wrong), end="\n" if wrong else "")
    print(json.dumps({"wrong": wrong, "runs": rows}, default=str))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
