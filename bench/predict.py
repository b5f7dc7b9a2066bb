"""Predicted against measured: decode tokens/s, prefill and time to first token of a model at several budgets.

    python bench/predict.py MODEL --ram 2GiB 4GiB 8GiB --rounds 3 --tokens 32

Each round first profiles the machine and the disk of the model's files (as `tierlm profile` does), then runs every
budget in its own process, in a memory cgroup of that size where possible; the next round reverses the order. A round is
predicted from its own profile. Memory rests for ``--rest`` seconds before each run: pages that a process has just freed
are touched ten times faster than pages that have been free for a while, as they usually are when a program starts.
``--add FILE`` keeps the rounds in a file, and includes earlier rounds of the same cases. ``--routing uniform`` suits
synthetic checkpoints, ``typical`` trained ones. The column that uses the measured bytes a token shows the error of the
time model apart from the cache's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from disk import drop_page_cache
from limited import available, run_case
from rich.console import Console
from rich.table import Table

from tierlm.config import RuntimeOptions, parse_size
from tierlm.models.catalog import Catalog
from tierlm.models.outline import KV_BYTES, kv_dtype_of, sizes_of, work_of
from tierlm.planning.cost import decode_seconds, streamed_bytes
from tierlm.planning.forecast import Question, forecast
from tierlm.profiling.profile import Profile, machine_of, read_profile

CONTEXT, CHUNK, WARM = 1024, 512, 8


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Run one case in this process: a prompt from cold, then decode."""
    from tierlm import LLM, Budget, SamplingParams

    def tokens(count: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=count, ignore_eos=True)

    with LLM.load(case["model"], budget=Budget(case["ram"]), context=CONTEXT, heat=False) as llm:
        vocab = llm._runtime.catalog.spec.vocab
        prompt = [(37 * i) % min(30_000, vocab - 5) + 5 for i in range(case["prompt"])]
        llm.generate([prompt], tokens(1))
        first = llm.stats()
        llm.generate([[7, 8, 9]], tokens(WARM))
        before = llm.stats()
        llm.generate([[5]], tokens(case["tokens"] + 1))
        after = llm.stats()
    made, seconds = (getattr(after.decode, n) - getattr(before.decode, n) for n in ("tokens", "seconds"))
    now, then = (stats.experts["ram"] for stats in (after, before))
    hits = now.hits + now.late_hits - then.hits - then.late_hits
    return {
        "decode": made / seconds,
        "bytes_per_token": (after.decode.disk_bytes - before.decode.disk_bytes) / made,
        "hit_rate": hits / (hits + now.misses - then.misses),
        "prefill": first.prefill.tokens / first.prefill.seconds,
        "first_token": first.first_token or 0.0,
        "load": first.load_seconds,
        "process": first.plan.ram.parts["interpreter and libraries"],
        "slots": first.plan.ram.expert_slots,
    }


def predict(case: dict[str, Any], profile: Profile, found: dict[str, float]) -> dict[str, float]:
    """The plan's prediction for a case, and the cost model's at the measured hit rate."""
    catalog = Catalog(Path(case["model"]))
    kv_item = KV_BYTES[kv_dtype_of(catalog, RuntimeOptions())]
    sizes, work = sizes_of(catalog, CONTEXT, CHUNK, kv_item), work_of(catalog)
    machine = machine_of(profile, vram=False)
    ram = parse_size(case["ram"])
    question = Question(ram, None, CONTEXT, case["prompt"], CHUNK, process=int(found["process"]))
    plan = forecast(sizes, work, machine, question)
    speed = plan.worst if case["routing"] == "uniform" else plan.typical
    demanded = work.moe_layers * work.experts_per_token * work.expert_bytes
    streamed = streamed_bytes(plan.plan, sizes.trunk)
    missed = max(0.0, found["bytes_per_token"] - streamed[0]) / demanded  # late hits are read too
    hits = (max(0.0, 1 - missed), max(0.0, 1 - missed))
    known = decode_seconds(work, machine, hits, streamed, 64)
    return {
        "predicted_decode": speed.decode,
        "predicted_decode_at_bytes": 1 / known.total,
        "predicted_hit_rate": speed.hit_rate,
        "predicted_bytes_per_token": speed.step.disk_bytes,
        "predicted_prefill": speed.prefill,
        "predicted_first_token": speed.prompt.total,
        "predicted_load": plan.load,
        "predicted_slots": plan.plan.ram.expert_slots,
    }


def profiled(folder: Path) -> Profile:
    """What `tierlm profile` measures now, on the disk of ``folder``."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "profile.json"
        command = [sys.executable, "-m", "tierlm", "profile", "--path", str(folder), "--json", str(file)]
        subprocess.run(command, check=True, capture_output=True)
        return read_profile(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ram", nargs="+", default=["2GiB", "4GiB", "8GiB"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--routing", choices=("uniform", "typical"), default="uniform")
    parser.add_argument("--rest", type=float, default=15.0)
    parser.add_argument("--add", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return
    in_cgroup = available()
    fixed = {"model": str(args.model), "tokens": args.tokens, "prompt": args.prompt, "routing": args.routing}
    known = json.loads(args.add.read_text()) if args.add and args.add.exists() else {"rates": [], "cases": {}}
    results: dict[str, list[dict[str, float]]] = {ram: known["cases"].get(ram, []) for ram in args.ram}
    rates: list[dict[str, Any]] = known["rates"]
    done = len(rates)
    for turn in range(done, done + args.rounds):
        profile = profiled(args.model)
        rates.append(dataclasses.asdict(machine_of(profile, vram=False)))
        for ram in args.ram if turn % 2 == 0 else reversed(args.ram):
            drop_page_cache(list(args.model.glob("*.safetensors")))
            time.sleep(args.rest)
            case = fixed | {"ram": ram}
            command = [sys.executable, __file__, "--one", json.dumps(case)]
            found = run_case(command, parse_size(ram) if in_cgroup else None)
            results[ram].append(found | predict(case, profile, found))
            print(f"round {turn + 1} {ram}: {found['decode']:.2f} tok/s", file=sys.stderr, flush=True)

    medians = {ram: {n: statistics.median(r[n] for r in rows) for n in rows[0]} for ram, rows in results.items()}
    pairs = ("decode", "predicted_decode"), ("decode", "predicted_decode_at_bytes"), ("prefill", "predicted_prefill")
    pairs += (("first_token", "predicted_first_token"), ("load", "predicted_load"))
    table = Table(title=f"{args.model.name}: measured / predicted (error), medians of {len(rates)} rounds")
    for column in ("ram", "slots", "hit rate", "MB/token", "decode tok/s", "at the bytes read", "prefill tok/s",
                   "first token s", "load s"):  # fmt: skip
        table.add_column(column)
    errors: dict[str, list[float]] = {}
    for ram, row in medians.items():
        shown = []
        for name, prediction in pairs:
            errors.setdefault(prediction, []).append(row[prediction] / row[name] - 1)
            shown.append(f"{row[name]:.2f} / {row[prediction]:.2f} ({errors[prediction][-1]:+.0%})")
        table.add_row(
            ram,
            f"{row['slots']:.0f} / {row['predicted_slots']:.0f}",
            f"{row['hit_rate']:.0%} / {row['predicted_hit_rate']:.0%}",
            f"{row['bytes_per_token'] / 1e6:.0f} / {row['predicted_bytes_per_token'] / 1e6:.0f}",
            *shown,
        )
    console = Console(width=170)
    console.print(table)
    for name, found_errors in errors.items():
        sizes = [abs(error) for error in found_errors]
        console.print(f"{name}: off by {statistics.median(sizes):.0%} (median), {max(sizes):.0%} at most")
    report = json.dumps({"cgroup": in_cgroup, "rates": rates, "cases": results})
    if args.add:
        args.add.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
