"""The arithmetic of weights in their stored formats: compiled kernels, and the torch reference beside them."""

from tierlm.kernels.linear import Weight, gated_mlp, linear, widen

__all__ = ["Weight", "gated_mlp", "linear", "widen"]
