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

    @property
    def bits(self) -> tuple[float, float, float, float]:
        """Bits of a weight of each."""
        experts, trunk, embedding, head = (FORMATS[name].bits for name in self)
        return experts, trunk, embedding, head


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
