"""The engine's overhead without arithmetic: seconds per layer, per expert, and of the start."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

# The embedded model: new tokens, prompt tokens (enough to use all experts), layers, experts of all layers; rounds.
DEMO_TOKENS, DEMO_PROMPT, DEMO_LAYERS, DEMO_RECORDS, DEMO_ROUNDS = 24, 64, 7, 6 * 32, 3


def engine_seconds() -> tuple[float, float]:
    """Seconds per layer of a decode step and per expert of a prefill with tiny weights: the embedded model, all
    resident.

    Before each timed decode step runs as much other arithmetic as a large model's layers have: its weights evict the
    interpreter from the caches, which makes the step much slower. Within the step nothing evicts, so the figure is a
    little lower than for a large model.
    """
    from tierlm.config import Budget, SamplingParams
    from tierlm.llm import LLM
    from tierlm.profiling.arithmetic import Stream

    with LLM.load("demo", budget=Budget("2GiB"), context=256, heat=False, probe="off") as llm:
        stream = Stream()

        def spent(prompt: list[int], tokens: int, layers: int = 0) -> tuple[float, float]:
            """Seconds of the prefill and of a decode step, with the arithmetic of ``layers`` before each step. The
            statistics count time in the engine only, so not that arithmetic."""
            before = llm.stats()
            for _ in llm.stream(prompt, SamplingParams(max_new_tokens=tokens, ignore_eos=True)):
                for _ in range(layers):
                    stream.run()
            after = llm.stats()
            steps = max(1, after.decode.tokens - before.decode.tokens)
            decode = (after.decode.compute - before.decode.compute) / steps
            return after.prefill.compute - before.prefill.compute, decode

        prompt = list(range(2, 2 + DEMO_PROMPT))
        spent(prompt, DEMO_TOKENS)  # the first run also faults pages in
        warm = spent([5], DEMO_TOKENS)[1]
        prefill = statistics.median(spent(prompt, 1)[0] for _ in range(DEMO_ROUNDS))
        cold = spent([5], DEMO_TOKENS, DEMO_LAYERS)[1]
    return max(warm, cold) / DEMO_LAYERS, max(0.0, prefill - warm) / DEMO_RECORDS


def start_seconds() -> float | None:
    """Seconds from the command until a model can load; None if no other interpreter can be started."""
    began = time.perf_counter()
    try:
        subprocess.run([sys.executable, "-c", "import tierlm.llm, tierlm.cli"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return time.perf_counter() - began
