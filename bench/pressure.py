"""--ram auto beside another program: its effect on slots, speed and tokens.

    python bench/pressure.py MODEL --limit 2GiB --leave 100MiB

In a memory cgroup of the limit (v1 or v2; needs root) a model generates with --ram auto. After a third of the tokens a
second process takes all free memory but ``--leave``, and holds it until the next third is done. The last line is JSON:
slots and seconds of each token, whether the tokens equal those without a second process, also the bits of their logits
when computed once more, and whether anything was killed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import xxhash
from limited import available, run_limited

from tierlm.config import parse_size
from tierlm.host import available_ram

HOG = "import sys, time; memory = bytearray(int(sys.argv[1])); memory[::4096] = b'x' * len(memory[::4096]); input()"


def generate(model: str, tokens: int, leave: int) -> None:
    """Runs inside the cgroup."""
    from tierlm import LLM, SamplingParams

    rows, ids, hog = [], [], None
    with LLM.load(model, context=512, heat=False) as llm:
        tier = llm._runtime.experts[-1]
        for number, piece in enumerate(
            llm.stream(list(range(5, 37)), SamplingParams(max_new_tokens=tokens, ignore_eos=True))
        ):
            if leave and number == tokens // 3:
                take = max(0, available_ram() - leave)
                hog = subprocess.Popen([sys.executable, "-c", HOG, str(take)], stdin=subprocess.PIPE)
            if hog is not None and number == 2 * tokens // 3:
                hog.communicate(b"\n")
            ids += piece.ids
            rows.append((len(tier.slots), llm.stats().decode.seconds))
        notes = [note for note in llm.stats().notes if "short of memory" in note]
        logits = xxhash.xxh3_128_hexdigest(llm.logits(ids).numpy())
    print(json.dumps({"ids": ids, "logits": logits, "rows": rows, "notes": notes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", default="2GiB")
    parser.add_argument("--leave", default="100MiB")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        generate(str(args.model), args.tokens, args.inside)
        return
    if not available():
        raise SystemExit("memory cgroups cannot be made here")
    found = []
    for leave in (0, parse_size(args.leave)):
        command = [sys.executable, __file__, str(args.model), "--tokens", str(args.tokens), "--inside", str(leave)]
        process, report = run_limited(command, parse_size(args.limit), capture_output=True, env=os.environ)
        if process.returncode:
            raise SystemExit(process.stderr)
        found.append(json.loads(process.stdout) | {"killed": report["killed"], "peak": report["peak"]})
    alone, beside = found
    thirds = [beside["rows"][at * args.tokens // 3 : (at + 1) * args.tokens // 3] for at in range(3)]
    for name, rows in zip(("before", "beside the other", "after"), thirds, strict=True):
        steps = [later[1] - earlier[1] for earlier, later in itertools.pairwise(rows)]
        slots = [row[0] for row in rows]
        print(f"{name}: {min(slots)} to {max(slots)} slots, {1 / statistics.median(steps):.2f} tokens/s")
    print("\n".join(beside["notes"]))
    same = {f"same {what}": alone[what] == beside[what] for what in ("ids", "logits")}
    print(json.dumps({**same, "killed": beside["killed"], "runs": found}))


if __name__ == "__main__":
    main()
