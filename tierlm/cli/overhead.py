"""What the engine costs beside its arithmetic: seconds of a layer, of an expert, and of the start."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

# The embedded model: new tokens, tokens of a prompt that uses all experts, layers, experts of all layers; rounds.
DEMO_TOKENS, DEMO_PROMPT, DEMO_LAYERS, DEMO_RECORDS, DEMO_ROUNDS = 24, 64, 7, 6 * 32, 3


def engine_seconds() -> tuple[float, float]:
    """Seconds of a layer in a decode step, and of an expert in a prefill, when the weights are tiny: the embedded
    model, all resident.

    A decode step is timed after as much other arithmetic as its layers have in a large model. Weights that go through
    the caches evict the interpreter, and a step then takes much longer. Within a step, a layer finds the caches as the
    layer before left them, so the figure is a little lower than for a layer of a large model.
    """
    from tierlm.config import Budget, SamplingParams
    from tierlm.llm import LLM
    from tierlm.profiling.arithmetic import Stream

    with LLM.load("demo", budget=Budget("2GiB"), context=256, heat=False, probe="off") as llm:
        stream = Stream()

        def spent(prompt: list[int], tokens: int, layers: int = 0) -> tuple[float, float]:
            """Seconds of the prefill and of a decode step, with the arithmetic of ``layers`` before each step.

            The statistics count time in the engine only: not what happens between two tokens.
            """
            before = llm.stats()
            for _ in llm.stream(prompt, SamplingParams(max_new_tokens=tokens, ignore_eos=True)):
                for _ in range(layers):
                    stream.run()
            after = llm.stats()
            steps = max(1, after.decode.tokens - before.decode.tokens)
            return (
                after.prefill.compute - before.prefill.compute,
                (after.decode.compute - before.decode.compute) / steps,
            )

        prompt = list(range(2, 2 + DEMO_PROMPT))
        spent(prompt, DEMO_TOKENS)  # the first time, memory is new as well
        warm = spent([5], DEMO_TOKENS)[1]
        prefill = statistics.median(spent(prompt, 1)[0] for _ in range(DEMO_ROUNDS))
        cold = spent([5], DEMO_TOKENS, DEMO_LAYERS)[1]
    return max(warm, cold) / DEMO_LAYERS, max(0.0, prefill - warm) / DEMO_RECORDS


def start_seconds() -> float | None:
    """Seconds from the command to when a model may be loaded; None if another interpreter cannot be started."""
    began = time.perf_counter()
    try:
        subprocess.run([sys.executable, "-c", "import tierlm.llm, tierlm.cli"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return time.perf_counter() - began
