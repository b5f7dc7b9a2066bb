"""Two storms over one model with few slots: interrupts at random instants, and threads with random cancels.

    python bench/storm.py demo --interrupts 5000 --threads 8 --requests 100

Each answer is compared with what its prompt gives alone. Exit code 1 if one differs, a call fails, or anything is left
over: a sequence, a span, a lease, a thread or a file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tierlm import LLM, Budget, SamplingParams

PROMPTS = [[5, 9, 23], [88], [7] * 30, [64, 2, 111, 12, 40], [3, 3], [100, 2, 50] * 4, [17], [90, 91, 92, 93]]
LENGTH = 8
PARAMS = SamplingParams(max_new_tokens=LENGTH, ignore_eos=True)
ENDING = 5.0  # seconds for the last threads to end
LATEST = 0.2  # seconds from the start of a call to its interrupt, at most

Call = Callable[[LLM, list[int]], Any]


def generate(llm: LLM, prompt: list[int]) -> Any:
    return llm.generate([prompt], PARAMS)[0].ids


def stream(llm: LLM, prompt: list[int]) -> Any:
    return [token for piece in llm.stream(prompt, PARAMS) for token in piece.ids]


def logits(llm: LLM, prompt: list[int]) -> Any:
    return llm.logits(prompt).numpy().tobytes()


CALLS: list[Call] = [generate, stream, logits]


def interrupts(llm: LLM, count: int, choose: random.Random) -> dict[str, int]:
    """Interrupt ``count`` calls of this, the main thread, at random instants."""
    expected = [[call(llm, prompt) for prompt in PROMPTS] for call in CALLS]
    armed, found = False, {"interrupted": 0, "finished": 0, "wrong": 0}

    def interrupt(number: int, frame: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    for _ in range(count):
        which, prompt = choose.randrange(len(CALLS)), choose.randrange(len(PROMPTS))
        try:
            signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-4, LATEST))
            armed = True
            answer = CALLS[which](llm, PROMPTS[prompt])
            armed = False
            found["finished"] += 1
            found["wrong"] += answer != expected[which][prompt]
        except KeyboardInterrupt:
            armed = False
            found["interrupted"] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    found["wrong"] += [[call(llm, prompt) for prompt in PROMPTS] for call in CALLS] != expected
    return found


def threads(llm: LLM, count: int, requests: int, seed: int) -> dict[str, int]:
    """``count`` threads of ``requests`` requests each; a third of the streams are left after some tokens."""
    alone = [generate(llm, prompt) for prompt in PROMPTS]
    found = {"finished": 0, "left": 0, "wrong": 0}
    lock = threading.Lock()

    def work(number: int) -> None:
        choose = random.Random(1000 * seed + number)
        for _ in range(requests):
            which, tokens = choose.randrange(len(PROMPTS)), list[int]()
            wanted = choose.randrange(LENGTH) if choose.random() < 1 / 3 else LENGTH
            try:
                if wanted == LENGTH and choose.random() < 0.5:
                    tokens = generate(llm, PROMPTS[which])
                else:
                    for piece in llm.stream(PROMPTS[which], PARAMS):
                        tokens += piece.ids
                        if len(tokens) >= wanted:
                            break
                good = tokens == alone[which][: len(tokens)] and len(tokens) >= wanted
            except Exception as error:
                print(error, file=sys.stderr)
                good = False
            with lock:
                found["finished" if wanted == LENGTH else "left"] += 1
                found["wrong"] += not good

    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


def left_over(llm: LLM) -> list[str]:
    """What is still held although nothing runs."""
    runtime: Any = llm._runtime
    llm.logits([3])  # behind the messages of what was cancelled
    scheduler = runtime.scheduler
    left = ["sequences"] if scheduler._waiting or scheduler._running else []
    left += [] if scheduler.cache.can_reserve(scheduler.cache.capacity) else ["spans"]
    for tier in (*runtime.experts, *runtime.trunk_tiers):
        tier.settle()
        tier.check_integrity()
    return left + ["leases"] * any(entry.pins for tier in runtime.experts for entry in tier.entries.values())


def held() -> tuple[int, int]:
    """Threads and open files of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ram", default="1GiB")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=128, help="small enough that some requests wait for room")
    parser.add_argument("--interrupts", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--requests", type=int, default=100, help="of each thread")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    options: dict[str, Any] = {"budget": Budget(args.ram), "ram_slots": args.slots, "context": args.context}
    LLM.load(args.model, **options).close()  # libraries keep a few threads and files
    before = held()
    with LLM.load(args.model, **options) as llm:
        result: dict[str, Any] = {"interrupts": interrupts(llm, args.interrupts, random.Random(args.seed))}
        result["threads"] = threads(llm, args.threads, args.requests, args.seed)
        result["left"] = left_over(llm)
    after, until = held(), time.monotonic() + ENDING
    while any(now > then for now, then in zip(after, before, strict=True)) and time.monotonic() < until:
        time.sleep(0.01)  # OpenMP's threads end after the thread that they worked for
        after = held()
    result |= {"held_before": before, "held_after": after}
    print(json.dumps(result))
    wrong = result["interrupts"]["wrong"] + result["threads"]["wrong"]
    if wrong or result["left"] or any(now > then for now, then in zip(after, before, strict=True)):
        sys.exit("something is wrong or left over")


if __name__ == "__main__":
    main()
