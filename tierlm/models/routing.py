"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import RouterCall, Rules, Weight, linear, route_few
from tierlm.models.layers import rms_norm
from tierlm.spec import ModelSpec


class Routers:
    """The routers of all layers. ``gates``: the resident norms and routers (models/deepseek.py, gate_tensors)."""

    def __init__(self, spec: ModelSpec, gates: Weights):
        self.spec, self.gates = spec, gates
        rule = spec.router
        softmax = rule.score == "softmax"
        self._rules = Rules(softmax, rule.groups, rule.groups_chosen, rule.normalize, rule.scale, spec.norm_eps)

    def score(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The scores of all experts, and by what the best are chosen, float32 [T, E] both, for normed ``x`` [T,
        hidden]."""
        gate, bias = self._gate(layer)
        logits = linear(x, gate)
        scores = logits.softmax(-1) if self.spec.router.score == "softmax" else logits.sigmoid()
        return scores, scores if bias is None else scores + bias.data.float()

    def route(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The weights, float32 [T, k], and experts, int64 [T, k], of each row of the normed ``x`` [T, hidden], the best
        first."""
        return self.route_ahead(x, layer, x, ())[:2]

    def route_ahead(
        self, x: Tensor, layer: int, hidden: Tensor, ahead: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``route``, and what the routers of the layers ``ahead`` make of ``hidden``, as ``guess``."""
        chosen = self.spec.experts_per_token
        routers = [RouterCall(x, *self._gate(layer), None), *(self._unnormed(hidden, later) for later in ahead)]
        found = route_few(routers, self._rules, chosen)
        if found is None:
            return *self._any(x, layer, chosen), [self.guess(hidden, later, chosen) for later in ahead]
        (weights, experts), *guesses = found
        return weights, experts, [guess for _, guess in guesses]

    def guess(self, hidden: Tensor, layer: int, chosen: int) -> Tensor:
        """The ``chosen`` experts that ``layer`` would rank first if ``hidden`` [T, hidden], not normed, came to it as
        it is: int64 [T, chosen]."""
        found = route_few([self._unnormed(hidden, layer)], self._rules, chosen)
        if found is not None:
            return found[0][1]
        return self._any(rms_norm(hidden, self.gates[f"{layer}.norm"], self.spec.norm_eps), layer, chosen)[1]

    def _gate(self, layer: int) -> tuple[Weight, Weight | None]:
        return self.gates[f"{layer}.gate"], self.gates.get(f"{layer}.bias")

    def _unnormed(self, hidden: Tensor, layer: int) -> RouterCall:
        return RouterCall(hidden, *self._gate(layer), self.gates[f"{layer}.norm"])

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
