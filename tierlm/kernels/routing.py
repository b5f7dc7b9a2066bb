"""Routers for a few tokens by the compiled kernels; (token, choice) pairs sorted by expert; the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tierlm.kernels import native
from tierlm.kernels.weight import ABSENT, VECTORS, Weight

FEW_ROWS = 8  # torch is faster for more rows


@dataclass(frozen=True, slots=True)
class Rules:
    """Constants of all routers of a model. ``softmax``: else sigmoid. ``normalize``: weights sum to one before they are
    multiplied by ``scale``. ``eps``: for the norm before the router."""

    softmax: bool
    groups: int
    groups_chosen: int
    normalize: bool
    scale: float
    eps: float


class RouterCall(NamedTuple):
    """One router and its input ``x``, float32 [T, hidden]. ``norm``: applied to ``x`` first; None if already normed."""

    x: Tensor
    gate: Weight
    bias: Weight | None
    norm: Weight | None


def route_few(routers: Sequence[RouterCall], rules: Rules, chosen: int) -> list[tuple[Tensor, Tensor]] | None:
    """For each router, the weights, float32 [T, chosen], and expert ids, int64 [T, chosen], best first; ties go to the
    lower id. None if no kernel supports these weights or there are too many rows."""
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
            words += ABSENT if vector is None else vector.operand
        words += (rules.softmax, rules.groups, rules.groups_chosen, rules.normalize, chosen)
        words += (x.data_ptr(), x.shape[0], weights.data_ptr(), experts.data_ptr())
        found.append((weights, experts))
    if library is not None:
        library.route(words, len(routers), rules.eps, rules.scale)
    return found


class Groups(NamedTuple):
    """The (token, choice) pairs of a layer, sorted by expert. Pair p is choice p % k of token p // k.

    ``experts``: the distinct ids, ascending. ``counts``: pairs per expert. ``order``: int64 [T * k], the pair in each
    row; the sort is stable. ``inverse``: int64 [T, k], the row of each pair.
    """

    experts: list[int]
    counts: list[int]
    order: Tensor
    inverse: Tensor


def grouped(experts: Tensor, count: int) -> Groups:
    """Group the expert ids ``experts``, int64 [T, k], all below ``count``."""
    library, pairs = native.load(), experts.numel()
    if library is None or experts.device.type != "cpu" or not experts.is_contiguous():
        return grouped_reference(experts, count)
    order, inverse = torch.empty(pairs, dtype=torch.int64), torch.empty_like(experts)
    pointers = experts.data_ptr(), order.data_ptr(), inverse.data_ptr()
    return Groups(*library.grouped(pointers, pairs, count), order, inverse)


def grouped_reference(experts: Tensor, count: int) -> Groups:
    """``grouped`` in torch."""
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    found = {expert: number for expert, number in enumerate(pairs.bincount(minlength=count).tolist()) if number}
    return Groups(list(found), list(found.values()), order, order.argsort().view_as(experts))


def combined(hidden: Tensor, shared: Tensor | None, weights: Tensor, outputs: Tensor, inverse: Tensor) -> Tensor:
    """The residual stream after a layer's experts, float32 [T, hidden]: ``hidden`` + ``shared`` + the weighted sum of
    outputs, in the router's order.

    ``weights``: float32 [T, k]. ``outputs``: float32 [T * k, hidden], sorted by expert; ``inverse``: from Groups.
    """
    library = native.load()
    operands = hidden, shared, weights, outputs, inverse
    if library is not None and hidden.device.type == "cpu" and all(x is None or x.is_contiguous() for x in operands):
        total = torch.empty_like(hidden)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (*operands, total)]
        library.combine(pointers, hidden.shape, weights.shape[1])
        return total
    weights, outputs = weights[:, None], outputs[inverse]  # [T, 1, k], [T, k, hidden]
    total = torch.bmm(weights, outputs) if shared is None else torch.baddbmm(shared[:, None], weights, outputs)
    return hidden + total[:, 0]
