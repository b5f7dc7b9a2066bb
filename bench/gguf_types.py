"""The types of a GGUF file's tensors, and their encoding; llama.cpp's library (bench/ggml.py) encodes K-quants."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

Type = gguf.GGMLQuantizationType
PLAIN = {"bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
MIXES = (*PLAIN, "q4_k_m", "mxfp4")
SMALLER = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}  # llama.cpp's, where rows are no multiple of 256 values
KEPT = 64  # encodings of tensors that repeat: bench/noise.py's `variety`, three matrices in at most two types


def type_of(mix: str, name: str, shape: tuple[int, ...], layer: int, layers: int) -> Type:
    """The type of the tensor ``name`` of GGUF in a file of a mix, row-major ``shape``.

    "q4_k_m": about llama.cpp's Q4_K_M: Q6_K for the head, and in half of the layers for values and down projections.
    "mxfp4": MXFP4 for experts, Q8_0 for the rest, as gpt-oss is published. Vectors and routers are float32.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name or name.endswith(".bias"):
        return Type.F32
    if mix == "mxfp4":
        return Type.MXFP4 if "_exps" in name else Type.Q8_0
    if mix != "q4_k_m":
        return PLAIN[mix]
    eighth = layers // 8
    finer = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    fine = name == "output.weight" or (finer and ("attn_v" in name or "ffn_down" in name))
    chosen = Type.Q6_K if fine else Type.Q4_K
    return SMALLER[chosen] if shape[-1] % 256 else chosen


def nbytes_of(kind: Type, values: int) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return values // block * size


@lru_cache(maxsize=1)
def _library() -> Any:
    from ggml import Ggml

    return Ggml(torch.get_num_threads())


@lru_cache(maxsize=KEPT)
def encode(tensor: Tensor, kind: Type) -> memoryview:
    """The bytes of [..., columns] values. Tensors are told apart by identity."""
    if kind == Type.BF16:
        return tensor.bfloat16().contiguous().view(torch.int16).numpy().data
    rows = tensor.float().contiguous().view(-1, tensor.shape[-1])
    if kind in (Type.Q4_K, Type.Q6_K):
        quantised: memoryview = _library().quantised(kind.name, rows).data
        return quantised
    encoded: np.ndarray[Any, Any] = gguf.quants.quantize(rows.numpy(), kind)
    return encoded.data
