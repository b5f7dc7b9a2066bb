"""What the engine takes beside its arithmetic: the seconds of a layer, of an expert, and of the start."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierlm.checkpoints.formats import Weights
    from tierlm.memory.trunks import Trunks
    from tierlm.profiling.arithmetic import Stream
    from tierlm.spec import UnitKey

# Of the embedded model: tokens that are made, and of a prompt that uses all experts; layers; experts of all layers.
DEMO_TOKENS, DEMO_PROMPT, DEMO_LAYERS, DEMO_RECORDS, DEMO_ROUNDS = 24, 64, 7, 6 * 32, 3


class _AfterOthers:
    """Trunks that are handed out after as much arithmetic as a layer of a large model has."""

    def __init__(self, trunks: Trunks, stream: Stream):
        self._trunks, self._stream = trunks, stream

    def get(self, key: UnitKey) -> Weights:
        self._stream.run()
        return self._trunks.get(key)


def engine_seconds() -> tuple[float, float]:
    """Seconds that a layer's decode step takes, and a prefill for each expert, when the weights are next to nothing:
    the embedded model, all of it resident. A decode step is timed with caches that other weights have gone through, as
    in a large model: there, all that is not arithmetic takes several times as long."""
    from tierlm.config import Budget, SamplingParams
    from tierlm.llm import LLM
    from tierlm.profiling.arithmetic import Stream

    prompt = [list(range(2, 2 + DEMO_PROMPT))]
    with LLM.load("demo", budget=Budget("2GiB"), context=256, heat=False, probe="off") as llm:

        def spent(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
            """Seconds of the prefill, and of the decode step of a token."""
            before = llm.stats()
            llm.generate(prompts, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
            after = llm.stats()
            made = max(1, after.decode.tokens - before.decode.tokens)
            return after.prefill.compute - before.prefill.compute, (after.decode.compute - before.decode.compute) / made

        spent(prompt, DEMO_TOKENS)  # the first time, memory is new as well
        warm = spent([[5]], DEMO_TOKENS)[1]
        prefill = statistics.median(spent(prompt, 1)[0] for _ in range(DEMO_ROUNDS))
        decoder, stream = llm._runtime.decoder, Stream()
        decoder.trunks = _AfterOthers(decoder.trunks, stream)  # type: ignore[assignment]
        spent([[5]], 2)
        already = stream.seconds
        step = spent([[5]], DEMO_TOKENS)[1] - (stream.seconds - already) / DEMO_TOKENS
    return max(warm, step) / DEMO_LAYERS, max(0.0, prefill - warm) / DEMO_RECORDS


def start_seconds() -> float | None:
    """Seconds from the command to when a model may be loaded; None if another interpreter cannot be started."""
    began = time.perf_counter()
    try:
        subprocess.run([sys.executable, "-c", "import tierlm.llm, tierlm.cli"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return time.perf_counter() - began
