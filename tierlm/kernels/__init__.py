"""The arithmetic of weights in their stored formats. Torch reference implementations."""

from tierlm.kernels.linear import Weight, gated_mlp, linear, widen

__all__ = ["Weight", "gated_mlp", "linear", "widen"]
