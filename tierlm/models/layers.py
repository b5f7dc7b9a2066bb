"""RMSNorm and rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tierlm.attention_spec import Rope, Yarn
from tierlm.kernels import Weight


def rms_norm(x: Tensor, weight: Weight | None, eps: float, zero_centred: bool = False) -> Tensor:
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467). float32 [..., n] -> float32 [..., n].

    ``weight``: None if the norm has none. ``zero_centred``: it is stored less one."""
    if weight is None:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    scale = weight.data.float() + 1.0 if zero_centred else weight.data.float()
    return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rope_frequencies(rope: Rope, dim: int) -> tuple[Tensor, float]:
    """Angle per position, float32 [dim / 2], and a factor for cosine and sine.

    YaRN (arXiv 2309.00071): dimensions that turn more than ``beta_fast`` times within the original context keep their
    frequency, fewer than ``beta_slow`` times: divided by ``factor``, with a linear ramp between. DeepSeek's ``mscale``
    and ``mscale_all_dim`` follow its modeling_deepseek.py.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / rope.theta**exponents
    yarn = rope.yarn
    if rope.divisors:
        plain = plain / torch.tensor(rope.divisors)
    if yarn is None:
        return plain, 1.0

    def dimension_turning(times: float) -> float:
        return dim * math.log(yarn.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(yarn.beta_fast), dimension_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    slowed = 1.0 / (yarn.factor * rope.theta**exponents)
    return slowed * ramp + plain * (1 - ramp), _attention_factor(yarn)


def softmax_scale(rope: Rope, query_dim: int) -> float:
    """1 / sqrt(query_dim); with YaRN, times the square of DeepSeek's mscale_all_dim term."""
    scale: float = query_dim**-0.5
    if rope.yarn is not None and rope.yarn.mscale_all_dim:
        scale *= _mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of ``x`` [T, heads, dim] by ``cos`` and ``sin`` [T, dim / 2].

    The result holds all first elements, then all second elements, even if ``interleaved``: queries and keys are only
    ever multiplied with each other, so their common order does not matter.
    """
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)
