"""The time to the first token of a long prompt: computed, with its prefix in RAM, and from disk after a restart.

    python bench/kv_reuse.py MODEL [--ram 16GiB] [--tokens 2000] [--settle 25] [--format exact]

Two processes, one after the other, with a store in a new folder. The first asks for a prompt, then twice for the same
prefix with another end. The second, after the restart, asks for the prefix with yet another end, which comes from disk,
then for a new prompt of the same length, which is computed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

END = 16  # tokens that differ


def first_tokens(arguments: argparse.Namespace, folder: str, seeds: list[tuple[int, int]], told: Connection) -> None:
    """Ask for prompts: the seeds of their prefix and of their end. Sends seconds to the first token, and statistics."""
    import torch

    from tierlm import LLM, Budget, SamplingParams
    from tierlm.config import LoadOptions
    from tierlm.engine.sequence import Keep

    options: LoadOptions = {"context": 3 * arguments.tokens, "kv_dtype": arguments.dtype}
    options["heat"] = arguments.settle > 0  # warm-up
    options |= {"kv_disk": "8GiB", "kv_folder": folder, "kv_format": arguments.format}
    with LLM.load(arguments.model, budget=Budget(arguments.ram), **options) as llm:
        time.sleep(arguments.settle)
        keep = Keep()

        def ids(seed: int, count: int) -> list[int]:
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(2, llm.vocab, (count,), generator=generator).tolist()

        for prefix, end in seeds:
            prompt = [*ids(prefix, arguments.tokens - END), *ids(1000 + end, END)]
            before, began = {name: tier.hit_tokens for name, tier in llm.stats().kv.items()}, time.perf_counter()
            next(iter(llm.stream(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True), keep=keep)))
            seconds = time.perf_counter() - began
            hits = {name: tier.hit_tokens - before[name] for name, tier in llm.stats().kv.items()}
            told.send({"seconds": seconds, "hit_tokens": hits})
        time.sleep(1)  # writes
        told.send({"kv": {name: vars(tier) for name, tier in llm.stats().kv.items()}})
        told.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--ram", default="16GiB")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--settle", type=float, default=0.0, help="seconds of warm-up before the first prompt; 0: none")
    parser.add_argument("--format", default="exact")
    parser.add_argument("--dtype", default="float32", help="of the cache")
    arguments = parser.parse_args()
    context, found = multiprocessing.get_context("spawn"), list[list[dict[str, Any]]]()
    with tempfile.TemporaryDirectory() as folder:
        for seeds in ([(0, 0), (0, 1), (0, 2)], [(0, 3), (1, 0)]):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=first_tokens, args=(arguments, folder, seeds, there))
            process.start()
            there.close()
            found.append(list(iter(here.recv, None)))
            process.join()
    names = ["computed, first process", "RAM", "RAM again", "disk, after a restart", "computed, after that"]
    for name, one in zip(names, [*found[0][:3], *found[1][:2]], strict=True):
        print(f"{name:26}{one['seconds']:8.3f} s  hits {one['hit_tokens']}", flush=True)
    print(
        json.dumps({"model": arguments.model, "tokens": arguments.tokens, "format": arguments.format, "found": found})
    )


if __name__ == "__main__":
    main()
