"""The arithmetic of weights in their stored formats: compiled kernels, and the torch reference beside them."""

from tierlm.kernels.attention import LatentAttention, attention_of_few
from tierlm.kernels.linear import from_latent, gated_mlp, gated_mlps, into_latent, linear, unwidened, widen
from tierlm.kernels.routing import Router, Rules, combined, route_few
from tierlm.kernels.weight import Weight

__all__ = [
    "LatentAttention",
    "Router",
    "Rules",
    "Weight",
    "attention_of_few",
    "combined",
    "from_latent",
    "gated_mlp",
    "gated_mlps",
    "into_latent",
    "linear",
    "route_few",
    "unwidened",
    "widen",
]
