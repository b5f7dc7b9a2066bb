"""Arithmetic on weights in their stored formats: compiled kernels, each with a torch reference."""

from tierlm.kernels.attention import LatentAttention, fused_mla_decode
from tierlm.kernels.chunk import attend_chunk, attend_latents
from tierlm.kernels.grouped_attention import GroupedAttention, fused_gqa_decode
from tierlm.kernels.linear import (
    ABSORB_ROWS,
    can_absorb,
    clamped_mlp,
    from_latent,
    gated_mlp,
    gated_mlps,
    glu_mlp,
    into_latent,
    linear,
    widen,
)
from tierlm.kernels.quantised import quantise
from tierlm.kernels.routing import Groups, RouterCall, Rules, combined, grouped, route_few
from tierlm.kernels.weight import Weight

__all__ = [
    "ABSORB_ROWS",
    "GroupedAttention",
    "Groups",
    "LatentAttention",
    "RouterCall",
    "Rules",
    "Weight",
    "attend_chunk",
    "attend_latents",
    "can_absorb",
    "clamped_mlp",
    "combined",
    "from_latent",
    "fused_gqa_decode",
    "fused_mla_decode",
    "gated_mlp",
    "gated_mlps",
    "glu_mlp",
    "grouped",
    "into_latent",
    "linear",
    "quantise",
    "route_few",
    "widen",
]
