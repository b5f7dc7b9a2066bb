"""A router, and the sum over what it chose, of a few tokens, by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tierlm.kernels import native
from tierlm.kernels.weight import VECTORS, Weight

FEW_ROWS = 8  # above it, torch's products and sorts are faster


@dataclass(frozen=True, slots=True)
class Rules:
    """What all routers of a model share: softmax rather than sigmoid, groups of experts, groups that are chosen, and
    whether the weights are made to sum up to one; they are multiplied by ``scale``. ``eps``: of the norm before."""

    softmax: bool
    groups: int
    groups_chosen: int
    normalize: bool
    scale: float
    eps: float


class RouterCall(NamedTuple):
    """One router and its input, float32 [T, hidden]. ``norm``: of ``x``, if that is still to be done."""

    x: Tensor
    gate: Weight
    bias: Weight | None
    norm: Weight | None


def route_few(routers: Sequence[RouterCall], rules: Rules, chosen: int) -> list[tuple[Tensor, Tensor]] | None:
    """Of each router the weights, float32 [T, chosen], and experts, int64 [T, chosen], the best first; of equals the
    lower number first. None where there are no kernels for these weights, or too many rows."""
    library = native.load()
    words: list[int] = []
    found = []
    for x, gate, bias, norm in routers:
        if library is None or not gate.plain or x.shape[0] > FEW_ROWS or not x.is_contiguous():
            return None
        if not all(vector is None or vector.format in VECTORS for vector in (bias, norm)):
            return None
        weights = torch.empty(x.shape[0], chosen)
        experts = torch.empty(x.shape[0], chosen, dtype=torch.int64)
        for vector in (gate, bias, norm):
            words += (0,) * 5 if vector is None else vector.operand
        words += (rules.softmax, rules.groups, rules.groups_chosen, rules.normalize, chosen)
        words += (x.data_ptr(), x.shape[0], weights.data_ptr(), experts.data_ptr())
        found.append((weights, experts))
    if library is not None:
        library.route(words, len(routers), rules.eps, rules.scale)
    return found


def combined(hidden: Tensor, shared: Tensor, weights: Tensor, outputs: Tensor, places: Sequence[int]) -> Tensor:
    """The residual stream after a layer's experts, float32 [T, hidden]: ``hidden`` + ``shared`` + the weighted sum of
    the outputs, in the router's order.

    ``weights``: float32 [T, k]. ``outputs``: float32 [T * k, hidden], of which ``places`` says for each token's choices
    which row is its.
    """
    library = native.load()
    operands = hidden, shared, weights, outputs
    if library is not None and hidden.device.type == "cpu" and all(tensor.is_contiguous() for tensor in operands):
        total = torch.empty_like(hidden)
        library.combine([tensor.data_ptr() for tensor in (*operands, total)], places, hidden.shape)
        return total
    index = torch.tensor(places, device=hidden.device).view(weights.shape)
    return hidden + torch.baddbmm(shared[:, None], weights[:, None], outputs[index])[:, 0]
