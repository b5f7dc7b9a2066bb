"""Write a synthetic checkpoint: the dimensions of a published model, random weights, any number of layers.

    python bench/synthetic.py deepseek-v2-lite /tmp/v2-lite --skew 0.5 --stickiness 0.35 --gguf /tmp/v2-lite.gguf
    python bench/synthetic.py deepseek-v3 /tmp/v3 --layers 3 --dtype fp8
    python bench/synthetic.py qwen3-30b-a3b /tmp/qwen3.gguf --gguf-type q4_k_m --skew 0.5 --stickiness 0.35

Without --skew and --stickiness routing is nearly uniform: the worst case for any cache. --skew S makes the expert of
rank r as popular as r ** -S: for S = 0.4, 0.6, 0.8 the hottest fifth of the experts gets 36, 45, 56 % of the choices
(V3: 37, 48, 61 %). --stickiness R makes the next token choose an expert again with probability R; 0.29 to 0.41 has been
reported for trained models. The weights are fitted to both; ``bench/routing.py`` measures the result in a run: on toys,
0 to 4 points more stickiness, and a hot share within 5 points once all topics had their turn. bench/noise.py explains
how the weights do it. --gguf writes the same weights for llama.cpp (bench/gguf_twin.py). If OUT ends with .gguf, only
that file is written; experts then share VARIETY different matrices of each kind, to save time, not bytes.

The folder is written shard by shard, in little more memory than a shard, the embedding and the head. It includes
the demo model's tokenizer, so that text can be typed in; the output is noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch
from noise import Noise
from safetensors.torch import save_file
from shapes import SHAPES, config_of
from torch import Tensor
from torch.nn import functional

import tierlm.demo
from tierlm.formats.fp8 import BLOCK
from tierlm.models import family_of, read_spec

SHARD_BYTES = 2**30
LARGEST_FP8 = 448.0  # of e4m3
VARIETY = 8


class Shards:
    """Collects tensors, writes a shard whenever there are enough, then the index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.size = 0
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self.pending[name] = tensor
        self.size += tensor.nbytes
        if self.size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            self.files.append(sorted(self.pending))
            save_file(self.pending, self.folder / f"part-{len(self.files):05}.safetensors", {"format": "pt"})
            print(f"shard {len(self.files)}: {self.size / 1e9:.2f} GB", file=sys.stderr, flush=True)
        self.pending, self.size = {}, 0

    def finish(self) -> None:
        self.flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.files, 1):
            final = f"model-{number:05}-of-{len(self.files):05}.safetensors"
            (self.folder / f"part-{number:05}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [out, in], and the scale of each block of 128 x 128, float32 [out / 128, in / 128] rounded up. Scales are
    powers of two, so that the product is exactly a bfloat16, as the GGUF twin needs."""
    rows, columns = matrix.shape
    padded = functional.pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax((1, 3)).clamp(min=1e-30)
    scale = torch.exp2((largest / LARGEST_FP8).log2().ceil())
    scaled = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn), scale


def write_model(
    shape: str,
    out: Path,
    layers: int | None = None,
    fp8: bool = False,
    skew: float = 0.0,
    stickiness: float = 0.0,
    seed: int = 0,
) -> None:
    """Write the model folder ``out``, which must not exist. Raises ValueError for impossible routing."""
    config = config_of(shape, layers, fp8)
    spec, family = read_spec(config, shape), family_of(config["model_type"], shape)
    noise = Noise(spec, skew, stickiness, seed)
    out.mkdir(parents=True)
    shards = Shards(out)
    wide = (family.embedding_name(), family.head_name(spec))
    for name, tensor in noise.tensors():
        if fp8 and tensor.dim() == 2 and name not in wide and not name.endswith("mlp.gate.weight"):
            tensor, scale = to_fp8(tensor)
            shards.add(name + "_scale_inv", scale)
        shards.add(name, tensor)
    shards.finish()
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(tierlm.demo.__file__).parent / file
        if source.exists():
            shutil.copy(source, out / file)
    count, dense = len(spec.layers), len(spec.layers) - len(spec.moe_layers)
    print(f"{out}: {count} layers, {dense} of them dense, {spec.experts} experts in the others", file=sys.stderr)


def write_file(shape: str, file: Path, mix: str, layers: int | None, skew: float, stickiness: float, seed: int) -> None:
    """Write the GGUF file alone. Raises ValueError for impossible routing."""
    from gguf_twin import write_gguf

    spec = read_spec(config_of(shape, layers, False), shape)
    write_gguf(spec, Noise(spec, skew, stickiness, seed, VARIETY).tensors(), file, mix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than published makes a smaller checkpoint")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--stickiness", type=float, default=0.0)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--gguf-type", choices=("bf16", "q8_0", "q4_0", "q4_k_m", "mxfp4"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers: expected at least 1, found {args.layers}")
    if args.skew < 0 or not 0 <= args.stickiness < 1:
        parser.error("--skew must not be negative, and --stickiness is a probability below 1")
    alone = args.out.suffix == ".gguf"
    if alone and (args.gguf or args.dtype != "bf16"):
        parser.error("--gguf and --dtype are for a folder")
    if "gpt-oss" in args.shape and not alone:
        parser.error("gpt-oss is written as a GGUF file only")
    if (args.gguf or alone) and not importlib.util.find_spec("gguf"):
        parser.error("a GGUF file needs the gguf package: pip install tierlm[peers]")
    try:
        if alone:
            write_file(args.shape, args.out, args.gguf_type, args.layers, args.skew, args.stickiness, args.seed)
            return
        write_model(args.shape, args.out, args.layers, args.dtype == "fp8", args.skew, args.stickiness, args.seed)
        if args.gguf:
            from gguf_twin import write_twin

            write_twin(args.out, args.gguf, args.gguf_type)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
