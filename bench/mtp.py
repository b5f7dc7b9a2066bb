"""Write the demo model with a layer of multi-token prediction, fitted to its own text, for bench/speculation.py --mtp.

    python bench/mtp.py /tmp/demo-mtp --windows 8

The layer is a copy of the model's last one. Its projection is fitted by ridge regression, so that from a token's state
and the next token's embedding it gives what the last layer sees of that token. A trained layer is right more often.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tierlm.demo
from tierlm import LLM, Budget
from tierlm.models.decoder import Segment
from tierlm.models.layers import rms_norm

WINDOW, RIDGE = 512, 1.0


def samples(llm: LLM, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Of one window: the projection's inputs, float32 [T - 1, 2 * hidden], and what it should give [T - 1, hidden]."""
    decoder, cache = llm._runtime.decoder, llm._runtime.scheduler.cache
    attention, last, seen = decoder._attention[0], decoder.spec.depth - 1, []
    forward = attention.forward

    def watched(hidden: Tensor, layer: int, *given: Any) -> tuple[Tensor, Tensor]:
        if layer == last:
            seen.append(hidden.clone())
        return forward(hidden, layer, *given)

    span, states = cache.reserve(len(ids)), torch.empty(len(ids), decoder.spec.hidden)
    attention.forward = watched  # type: ignore[method-assign]
    decoder.forward([Segment(ids, span)], prefill=True, states=states)
    del attention.forward
    cache.release(span)
    eps = decoder.spec.norm_eps
    embedded = rms_norm(decoder.embedding.read(ids[1:]), None, eps)
    return torch.cat((embedded, rms_norm(states[:-1], None, eps)), dim=1), seen[0][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens")
    args = parser.parse_args()

    demo = Path(tierlm.demo.__file__).parent
    with LLM.load("demo", budget=Budget("1GiB"), context=1024) as llm:
        ids = llm.codec.encode(
            (demo / "heldout-python-docs.txt").read_text(encoding="utf-8")[: 5 * WINDOW * args.windows]
        )
        windows = [ids[at : at + WINDOW] for at in range(0, WINDOW * args.windows, WINDOW)]
        found = [samples(llm, window) for window in windows if len(window) > 1]
    inputs, wanted = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    square = inputs.t() @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(square, inputs.t() @ wanted).t().to(torch.bfloat16).contiguous()

    shutil.copytree(demo, args.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tensors, config = load_file(demo / "model.safetensors"), json.loads((demo / "config.json").read_text())
    depth, ones = config["num_hidden_layers"], torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    old, new = f"model.layers.{depth - 1}.", f"model.layers.{depth}."
    tensors |= {new + name.removeprefix(old): value.clone() for name, value in tensors.items() if name.startswith(old)}
    tensors |= {f"{new}{name}.weight": ones.clone() for name in ("enorm", "hnorm")}
    tensors |= {f"{new}eh_proj.weight": fitted, f"{new}shared_head.norm.weight": tensors["model.norm.weight"].clone()}
    save_file(tensors, args.out / "model.safetensors", {"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}, indent=2))


if __name__ == "__main__":
    main()
