"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tierlm.kernels import linear, route_few
from tierlm.models.layers import rms_norm
from tierlm.spec import ModelSpec
from tierlm.weights.formats import Weights


class Routers:
    """The routers of all layers. ``gates``: the resident norms and routers (models/deepseek.py, gate_tensors)."""

    def __init__(self, spec: ModelSpec, gates: Weights):
        self.spec, self.gates = spec, gates

    def score(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The scores of all experts, and by what the best are chosen, float32 [T, E] both, for normed ``x`` [T,
        hidden]."""
        logits, bias = linear(x, self.gates[f"{layer}.gate"]), self.gates.get(f"{layer}.bias")
        scores = logits.softmax(-1) if self.spec.router.score == "softmax" else logits.sigmoid()
        return scores, scores if bias is None else scores + bias.data.float()

    def route(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The weights, float32 [T, k], and experts, int64 [T, k], of each row of the normed ``x`` [T, hidden], the best
        first."""
        chosen = self.spec.experts_per_token
        return self._few(x, layer, chosen, normed=True) or self._any(x, layer, chosen)

    def guess(self, hidden: Tensor, layer: int, chosen: int) -> Tensor:
        """The ``chosen`` experts that ``layer`` would rank first if ``hidden`` [T, hidden], not normed, came to it as
        it is: int64 [T, chosen]."""
        few = self._few(hidden, layer, chosen, normed=False)
        if few is not None:
            return few[1]
        return self._any(rms_norm(hidden, self.gates[f"{layer}.norm"], self.spec.norm_eps), layer, chosen)[1]

    def _few(self, x: Tensor, layer: int, chosen: int, normed: bool) -> tuple[Tensor, Tensor] | None:
        """By the kernels, where they know these weights and are the faster way."""
        rule, gates = self.spec.router, self.gates
        norm = None if normed else gates[f"{layer}.norm"]
        rules = rule.score == "softmax", rule.groups, rule.groups_chosen, rule.normalize
        gate, bias = gates[f"{layer}.gate"], gates.get(f"{layer}.bias")
        return route_few(x, gate, bias, norm, rules, chosen, self.spec.norm_eps, rule.scale)

    def _any(self, x: Tensor, layer: int, chosen: int) -> tuple[Tensor, Tensor]:
        rule = self.spec.router
        scores, choice = self.score(x, layer)
        if rule.groups > 1:
            grouped = choice.view(len(x), rule.groups, -1)
            best = grouped.amax(-1) if rule.score == "softmax" else grouped.topk(2, dim=-1).values.sum(-1)
            kept = best.topk(rule.groups_chosen, dim=-1).indices
            closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            choice = grouped.masked_fill(closed[..., None], float("-inf")).view_as(choice)
        experts = choice.topk(chosen, dim=-1).indices
        weights = scores.gather(1, experts)
        if rule.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * rule.scale, experts
