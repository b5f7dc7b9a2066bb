"""Routers: the expert ids and router weights of each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import RouterCall, Rules, Weight, linear, route_few
from tierlm.models.layers import rms_norm
from tierlm.spec import ModelSpec, RouterSpec


class Router:
    """The routers of all MoE layers. ``resident``: the tensors of ResidentKey (models/family.py)."""

    def __init__(self, spec: ModelSpec, resident: Weights):
        self.spec = spec
        rule = RouterSpec("softmax") if spec.moe is None else spec.moe.router
        softmax = rule.score == "softmax"
        self._rules = Rules(softmax, rule.groups, rule.groups_chosen, rule.normalize, rule.scale, spec.norm_eps)
        self._layers = {
            layer: (resident[f"{layer}.router"], resident.get(f"{layer}.correction"), resident[f"{layer}.norm"])
            for layer in spec.moe_layers
        }
        self._biases = {layer: resident[f"{layer}.router_bias"] for layer in spec.moe_layers} if rule.bias else {}
        self._scales: dict[int, Tensor] = {}  # of each expert, by layer
        if rule.own_norm:
            for layer, (matrix, correction, _) in self._layers.items():
                norm = resident[f"{layer}.router_norm"].data.float() * spec.hidden**-0.5
                self._layers[layer] = matrix, correction, Weight(norm, "f32", None, tuple(norm.shape))
                self._scales[layer] = resident[f"{layer}.expert_scale"].data.float()

    def normed(self, hidden: Tensor, x: Tensor, layer: int) -> Tensor:
        """The input of the router of ``layer``: ``x``, the norm of ``hidden``, unless the router has its own norm."""
        return rms_norm(hidden, self._layers[layer][2], self.spec.norm_eps) if self._scales else x

    def score(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Normed ``x`` [T, hidden] -> the scores of all experts, and the same corrected for selection, both float32
        [T, E]."""
        matrix, correction, _ = self._layers[layer]
        logits = linear(x, matrix)
        if self._biases:
            logits += self._biases[layer].data.float()
        scores = logits.softmax(-1) if self._rules.softmax else logits.sigmoid()
        return scores, scores if correction is None else scores + correction.data.float()

    def route(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Normed ``x`` [T, hidden] -> router weights, float32 [T, k], and expert ids, int64 [T, k], best first."""
        return self.route_ahead(x, layer, x, ())[:2]

    def route_ahead(
        self, x: Tensor, layer: int, hidden: Tensor, ahead: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``route``, and ``rank`` of ``hidden`` for each layer in ``ahead``."""
        chosen = self.spec.experts_per_token
        matrix, correction, _ = self._layers[layer]
        calls = [RouterCall(x, matrix, correction, None), *(self._call(hidden, later) for later in ahead)]
        found = None if self._biases else route_few(calls, self._rules, chosen)
        if found is None:
            weights, experts = self._choose(x, layer, chosen)
            rankings = [self.rank(hidden, later, chosen) for later in ahead]
        else:
            (weights, experts), *others = found
            rankings = [ranked for _, ranked in others]
        if self._scales:
            weights = weights * self._scales[layer][experts]
        return weights, experts, rankings

    def rank(self, hidden: Tensor, layer: int, chosen: int) -> Tensor:
        """The top ``chosen`` experts of ``layer`` for ``hidden`` [T, hidden], not normed: int64 [T, chosen]."""
        found = None if self._biases else route_few([self._call(hidden, layer)], self._rules, chosen)
        if found is not None:
            return found[0][1]
        return self._choose(self._normed(hidden, layer), layer, chosen)[1]

    def _call(self, hidden: Tensor, layer: int) -> RouterCall:
        """The router of ``layer`` on ``hidden``, which the kernel norms, unless norms are stored less one."""
        matrix, correction, norm = self._layers[layer]
        if self.spec.zero_centred:
            return RouterCall(self._normed(hidden, layer), matrix, correction, None)
        return RouterCall(hidden, matrix, correction, norm)

    def _normed(self, hidden: Tensor, layer: int) -> Tensor:
        return rms_norm(hidden, self._layers[layer][2], self.spec.norm_eps, self.spec.zero_centred)

    def _choose(self, x: Tensor, layer: int, chosen: int) -> tuple[Tensor, Tensor]:
        """``route`` in torch, for any number of rows."""
        rule = self._rules
        scores, choice = self.score(x, layer)
        if rule.groups > 1:
            grouped = choice.view(len(x), rule.groups, -1)
            best = grouped.amax(-1) if rule.softmax else grouped.topk(2, dim=-1).values.sum(-1)
            kept = best.topk(rule.groups_chosen, dim=-1).indices
            closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            choice = grouped.masked_fill(closed[..., None], float("-inf")).view_as(choice)
        experts = choice.topk(chosen, dim=-1).indices
        weights = scores.gather(1, experts)
        if rule.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * rule.scale, experts
