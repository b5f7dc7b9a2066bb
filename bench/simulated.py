"""How close the simulator is to the engine: run a model at some cache sizes, simulate its trace with the speeds that
the run showed, and print both.

    python bench/simulated.py demo --slots 24 48 96 --tokens 128

A layer's compute time comes from a run with everything resident; the disk's bandwidth from each run's own busy time.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tierlm import LLM, Budget, SamplingParams, Stats
from tierlm.policies.predictors import make_predictor
from tierlm.tracing.link import Speed
from tierlm.tracing.replay import open_policy
from tierlm.tracing.simulate import simulate
from tierlm.tracing.timing import Rates
from tierlm.tracing.traceforms import read_trace

PROMPT = [(37 * i + 11) % 1000 + 2 for i in range(16)]


def measure(model: str, ram: str, tokens: int, predictor: str, slots: int | None, file: Path) -> Stats:
    """The statistics of one run, whose trace goes to ``file``."""
    options: dict[str, Any] = {"heat": False, "predictor": predictor, "ram_slots": slots, "transfer_threads": 4}
    with LLM.load(model, budget=Budget(ram), trace=file, trace_scores=True, **options) as llm:
        llm.generate([PROMPT], SamplingParams(max_new_tokens=tokens, ignore_eos=True))
        return llm.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ram", default="8GiB")
    parser.add_argument("--slots", nargs="+", type=int, default=[24, 48, 96])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--predictor", default="none")
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace"
        resident = measure(args.model, args.ram, args.tokens, args.predictor, None, file)
        trace = read_trace(file)
        computing = (resident.decode.seconds - resident.decode.stall) / resident.decode.tokens / trace.moe_layers
        for slots in args.slots:
            stats = measure(args.model, args.ram, args.tokens, args.predictor, slots, file)
            link, trace = stats.links["disk->ram"], read_trace(file, scores=True)
            chosen = trace.experts.shape[2]
            machine = Rates(
                trace.info.record_bytes,
                Speed(link.bytes / link.seconds, 1e-4, 4),
                computing / 2,
                computing / 2 / chosen,
            )
            policy, predictions = open_policy("default", trace, slots), make_predictor(args.predictor, chosen)
            found = simulate(trace, policy, predictions, slots, machine)
            rows.append(
                {
                    "slots": slots,
                    "hit_rate": stats.hit_rate,
                    "hit_rate_simulated": found.hit_rate,
                    "tokens_per_second": stats.decode.tokens / stats.decode.seconds,
                    "tokens_per_second_simulated": found.tokens_per_second,
                }
            )
            print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items() if value is not None))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
