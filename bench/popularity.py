"""What a router needs to have hot experts, and to choose alike for consecutive tokens.

A router sees logits that are normal with variance one. Both fits draw such logits, let the runtime's own ``Router``
choose, and adjust their result until the choices are as requested.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tierlm.kernels import Weight
from tierlm.models.router import Router
from tierlm.spec import ModelSpec, RouterSpec

SAMPLES = 4096
STEPS = 80
RATE = {"softmax": 0.2, "sigmoid": 0.04}  # of a step: a sigmoid's scores spread over a fifth of its logits' spread
CEILING = 0.9  # the largest requested probability; a certain choice needs an infinite bias


def route(spec: ModelSpec, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The router's weights, float32 [n, k], and expert ids, int64 [n, k], for ``logits`` [n, experts] under a bias:
    V3's correction bias acts on the scores; V2 has none, so the logits are shifted."""
    alone = replace(spec, layers=(spec.layers[spec.moe_layers[0]],))
    eye = Weight(torch.eye(spec.experts), "f32")
    resident = {"0.router": eye, "0.norm": Weight(torch.ones(spec.experts), "f32")}
    if router_of(spec).bias:
        resident["0.router_bias"] = Weight(torch.zeros(spec.experts), "f32")
    if not router_of(spec).correction:
        return Router(alone, resident).route(logits + bias, 0)
    return Router(alone, resident | {"0.correction": Weight(bias, "f32")}).route(logits, 0)


def router_of(spec: ModelSpec) -> RouterSpec:
    assert spec.moe is not None, "a model without experts"
    return spec.moe.router


def zipf(spec: ModelSpec, skew: float) -> Tensor:
    """How often a token chooses the expert of each rank, float32 [experts]: falls as rank ** -skew, and sums to k."""
    falling = torch.arange(1, spec.experts + 1, dtype=torch.float32) ** -skew
    low, high = 0.0, spec.experts_per_token / float(falling.min())
    for _ in range(60):  # the others get what CEILING cuts off
        middle = (low + high) / 2
        asked = float((middle * falling).clamp(max=CEILING).sum())
        low, high = (low, middle) if asked > spec.experts_per_token else (middle, high)
    return (low * falling).clamp(max=CEILING)


def fit_bias(spec: ModelSpec, skew: float) -> Tensor:
    """The bias of each expert, float32 [experts], that makes choices fall off as ``zipf``.

    Ranks alternate between the router's groups, so every group has its share of hot experts.
    """
    groups = router_of(spec).groups
    target = zipf(spec, skew).view(-1, groups).t().flatten()
    logits, bias = torch.randn(SAMPLES, spec.experts), torch.zeros(spec.experts)
    if skew == 0:
        return bias
    for _ in range(STEPS):
        counts = route(spec, logits, bias)[1].flatten().bincount(minlength=spec.experts)
        bias += RATE[router_of(spec).score] * (target / (counts + 0.5) * SAMPLES).log()
    return bias - bias.mean()


def expert_gain(spec: ModelSpec, bias: Tensor) -> float:
    """The factor on an expert's output that gives the weighted sum of a token's experts the spread of one output."""
    weights, _ = route(spec, torch.randn(SAMPLES, spec.experts), bias)
    return float(weights.square().sum(-1).mean()) ** -0.5


def reuse(spec: ModelSpec, bias: Tensor, common: float) -> float:
    """P(the next token chooses an expert again) if ``common`` of the logits' variance is shared."""
    same = common**0.5 * torch.randn(SAMPLES, spec.experts)
    first, second = (
        route(spec, same + (1 - common) ** 0.5 * torch.randn(SAMPLES, spec.experts), bias)[1] for _ in range(2)
    )
    return float((first[:, :, None] == second[:, None, :]).any(-1).float().mean())


def fit_common(spec: ModelSpec, bias: Tensor, stickiness: float, stay: float) -> float:
    """The share of the logits' variance that tokens of one topic must have in common for ``reuse`` to be
    ``stickiness``, if the next token keeps the topic with probability ``stay``. Raises ValueError."""
    if stickiness == 0:
        return 0.0
    apart = reuse(spec, bias, 0.0)
    most = stay + (1 - stay) * apart
    if not apart <= stickiness < most:
        raise ValueError(f"stickiness {stickiness}: with this skew from {apart:.2f} to {most:.2f} is possible, or 0")
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        found = stay * reuse(spec, bias, middle) + (1 - stay) * apart
        low, high = (low, middle) if found > stickiness else (middle, high)
    return low
