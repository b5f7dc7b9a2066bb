"""The arithmetic of weights in their stored formats: compiled kernels, and the torch reference beside them."""

from tierlm.kernels.linear import from_latent, gated_mlp, gated_mlps, into_latent, linear, unwidened, widen
from tierlm.kernels.weight import Weight

__all__ = ["Weight", "from_latent", "gated_mlp", "gated_mlps", "into_latent", "linear", "unwidened", "widen"]
