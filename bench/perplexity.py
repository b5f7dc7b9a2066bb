"""What a format costs in quality: held-out perplexity of a model as published, and packed in other formats.

    python bench/perplexity.py [demo] [--formats int8/int8 int4/int8 int4/int4] [--windows N]

A pair is EXPERTS/TRUNK, as `tierlm pack` takes them. The text (default: the demo model's held-out texts) is cut into
windows. Each is a separate prompt; every next token is scored. Each model is run with a float32 and with a bfloat16 KV
cache. An error of logits is their root mean square difference, over the spread of the logits that they are compared
with: of the format, from the original's with a float32 cache; of the bfloat16 cache, from the same model's with a
float32 cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from tierlm import LLM, Budget
from tierlm.checkpoints.hub import DEMO, find_model
from tierlm.models.packing import pack_model

TEXTS = [DEMO / "heldout-python-docs.txt", DEMO / "heldout-sotu.txt"]
SETTINGS = ["bf16/bf16", "int8/int8", "int4/int8", "int4/int4"]


def perplexity(
    folder: Path, texts: list[Path], window: int, windows: int, kv_dtype: str = "float32"
) -> tuple[float, Tensor]:
    """exp of the mean negative log likelihood of each token after its window's first, over all texts; and all logits
    [windows * window, vocab]."""
    losses, found = [], []
    with LLM.load(folder, budget=Budget("4GiB"), heat=False, predictor="none", kv_dtype=kv_dtype) as llm:
        for text in texts:
            ids = llm.codec.encode(text.read_text(encoding="utf-8"))
            for start in range(0, min(len(ids) - window, windows * window), window):
                part = ids[start : start + window + 1]
                logits = llm.logits(part[:-1])
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(part[1:])))
                found.append(logits)
    return math.exp(torch.stack(losses).double().mean()), torch.cat(found)


def error(logits: Tensor, original: Tensor) -> float:
    """Root mean square difference, over the spread of a row of ``original``."""
    return float((logits - original).pow(2).mean().sqrt() / original.std(-1).pow(2).mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--formats", nargs="+", default=SETTINGS, help="EXPERTS/TRUNK")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--windows", type=int, default=40, help="of each text, at most")
    arguments = parser.parse_args()
    source = Path(find_model(arguments.model))
    amount = arguments.text, arguments.window, arguments.windows
    original, logits = perplexity(source, *amount)
    print(f"as it is    perplexity {original:.4f} over {len(logits)} tokens", flush=True)
    cache = bfloat16_cache(source, original, logits, *amount)
    found = []
    for setting in arguments.formats:
        experts, trunk = setting.split("/")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "packed"
            began = time.perf_counter()
            pack_model(source, out, experts=experts, trunk=trunk)
            seconds = time.perf_counter() - began
            size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            value, others = perplexity(out, *amount)
            off, cost = error(others, logits), f"{size / 1e6:.1f} MB in {seconds:.1f} s"
            change = f"{value / original - 1:+.2%}; error {off:.2%}"
            print(f"{setting:12}perplexity {value:.4f}, {change}; {cost}", flush=True)
            row = {"experts": experts, "trunk": trunk, "perplexity": value, "error": off, "bytes": size}
            found.append(row | {"bfloat16_cache": bfloat16_cache(out, value, others, *amount)})
    print(json.dumps({"model": arguments.model, "perplexity": original, "bfloat16_cache": cache, "packed": found}))


def bfloat16_cache(
    folder: Path, exact: float, logits: Tensor, texts: list[Path], window: int, windows: int
) -> dict[str, float]:
    """What the cache costs a model whose perplexity and logits with a float32 cache are given."""
    value, others = perplexity(folder, texts, window, windows, kv_dtype="bfloat16")
    off = error(others, logits)
    print(f"  bf16 cache  perplexity {value:.4f}, {value / exact - 1:+.3%}; error {off:.2%}", flush=True)
    return {"perplexity": value, "error": off}


if __name__ == "__main__":
    main()
