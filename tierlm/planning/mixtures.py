"""The formats of a model's parts, in published checkpoints and in the output of `tierlm pack`. No torch."""

from __future__ import annotations

from typing import NamedTuple

from tierlm.formats import FORMATS


class Mixture(NamedTuple):
    """Names of formats: matrices of routed experts, of trunks, embedding, lm_head. Vectors, routers and biases always
    take 16 bits."""

    experts: str
    trunk: str
    embedding: str
    head: str


MIXTURES = {
    "bf16": Mixture("bf16", "bf16", "bf16", "bf16"),
    "fp8": Mixture("fp8", "fp8", "bf16", "bf16"),
    "int8": Mixture("int8", "int8", "int8", "int8"),
    "int4": Mixture("int4", "int8", "int8", "int8"),
    "mxfp4": Mixture("mxfp4", "bf16", "bf16", "bf16"),
    "int4_g32": Mixture("int4_g32", "bf16", "bf16", "bf16"),
    "nvfp4": Mixture("nvfp4", "bf16", "bf16", "bf16"),
    "q4_k_m": Mixture("q4_k_m", "q4_k", "q4_k", "q6_k"),  # llama.cpp, llama_tensor_get_type
}
INSTEAD = {"q4_k": "q5_0", "q6_k": "q8_0"}  # in llama.cpp, of rows that are not whole blocks


def bits_of(format: str, columns: int) -> float:
    """Bits of a weight in rows of ``columns``. Of an expert in q4_k_m, where only the down projection may have other
    rows: on average, half of q4_k and half of q6_k."""
    if columns % FORMATS["q4_k"].block[1] == 0 or format not in (*INSTEAD, "q4_k_m"):
        return FORMATS[format].bits
    more = {name: FORMATS[other].bits - FORMATS[name].bits for name, other in INSTEAD.items()}
    return FORMATS[format].bits + more.get(format, sum(more.values()) / 2)
