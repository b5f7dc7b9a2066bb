"""What formats lose: the relative root mean square error of gaussian weights and of gaussian activations.

    python bench/rounding.py

int4 with searched scales beside plain rounding to nearest, and beside llama.cpp's types, quantised by its own library.
The last line is JSON.
"""

from __future__ import annotations

import json

import gguf
import torch
from ggml import BLOCKS, Ggml
from rich.console import Console
from rich.table import Table

from tierlm.formats import FORMATS
from tierlm.formats.tiles import GROUP
from tierlm.kernels import quantise, widen
from tierlm.kernels.quantised import rounded


def nearest(values: torch.Tensor) -> torch.Tensor:
    """int4 with the largest value of a group mapped to 7."""
    groups = values.view(len(values), -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(values)


def through_ggml(ggml: Ggml, type: str, values: torch.Tensor) -> torch.Tensor:
    data = ggml.quantised(type, values).reshape(len(values), -1)
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type]))


def main() -> None:
    values = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    ggml = Ggml(1)
    made = {f"tierlm {format}": (FORMATS[format].bits, widen(quantise(values, format))) for format in ("int8", "int4")}
    made["int4, nearest"] = (4.5, nearest(values))
    made["bf16"] = (16.0, values.bfloat16().float())
    for type, (per, size) in BLOCKS.items():
        if type != "BF16":
            made[f"llama.cpp {type}"] = (8 * size / per, through_ggml(ggml, type, values))
    made["activations, int8"] = (10.0, rounded(values))
    table, found = Table("format", "bits", "relative RMS error"), {}
    for name, (bits, values_made) in made.items():
        found[name] = float((values_made - values).norm() / values.norm())
        table.add_row(name, f"{bits:.2f}", f"{found[name]:.2%}")
    Console().print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
