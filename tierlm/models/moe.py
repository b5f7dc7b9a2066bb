"""Mixture of experts: route, acquire, compute, combine. Where the model meets the memory."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import torch
from torch import Tensor

from tierlm.analysis.recorder import AHEAD, Recorder
from tierlm.kernels import Weight, linear
from tierlm.memory.store import Store
from tierlm.models.layers import rms_norm
from tierlm.policies.prediction import Predictor
from tierlm.spec import ModelSpec, Router
from tierlm.timeline import Timeline, span
from tierlm.weights.formats import Weights, expert_ffns


def score(x: Tensor, gate: Weight, bias: Weight | None, rule: Router) -> tuple[Tensor, Tensor]:
    """The scores of all experts, and by what the best are chosen, float32 [T, E] both, for ``x`` [T, hidden]."""
    logits = linear(x, gate)
    scores = logits.softmax(-1) if rule.score == "softmax" else logits.sigmoid()
    return scores, scores if bias is None else scores + bias.data.float()


def route(x: Tensor, gate: Weight, bias: Weight | None, rule: Router, chosen: int) -> tuple[Tensor, Tensor]:
    """The weights, float32 [T, k], and experts, int64 [T, k], of each row of ``x`` [T, hidden], the best first."""
    scores, choice = score(x, gate, bias, rule)
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


class MixtureOfExperts:
    """The MoE part of all layers. ``gates``: the resident norms and routers (models/deepseek.py, gate_tensors)."""

    def __init__(
        self,
        spec: ModelSpec,
        gates: Weights,
        store: Store,
        predictor: Predictor,
        timeline: Timeline | None = None,
        recorder: Recorder | None = None,
    ):
        self.spec, self.gates, self.store, self.predictor, self.timeline = spec, gates, store, predictor, timeline
        self.recorder = recorder

    def forward(self, hidden: Tensor, x: Tensor, layer: int, trunk: Weights, prefill: bool) -> Tensor:
        """``hidden`` is the residual stream, ``x`` its norm, float32 [T, hidden] both -> float32 [T, hidden].

        The shared expert is computed with what is there at once, while the rest is read.
        The (token, choice) pairs are grouped by expert, each expert's rows computed together; the sum over the choices
        runs in the router's order, so that the order in which experts arrive does not reach the result.
        """
        weights, experts = self._route(x, layer)
        if self.recorder is not None:
            self._record(self.recorder, hidden, x, layer, experts)
        chosen = experts.shape[1]
        pairs = experts.flatten().argsort(stable=True)  # [T * k], grouped by expert
        counts = Counter(experts.flatten().tolist())
        needed = sorted(counts)
        ends = dict(zip(needed, itertools.accumulate(counts[expert] for expert in needed), strict=True))
        outputs = x.new_empty(len(pairs), x.shape[1])  # in the order of pairs
        with self.store.acquire(layer, needed, passing=prefill) as leases:
            self.predictor.observe(layer, needed)
            for ahead in range(1, self.predictor.lookahead + 1):
                self._look_ahead(hidden, layer + ahead, ahead, prefill)
            shared = torch.zeros_like(x)
            jobs: list[tuple[Tensor, Tensor, Weights]] = [(x, shared, trunk)] * bool(self.spec.shared_experts)
            for batch in leases:
                for expert, record in batch:
                    mine = slice(ends[expert] - counts[expert], ends[expert])
                    rows = x if len(x) == 1 else x[pairs[mine] // chosen]
                    jobs.append((rows, outputs[mine], record))
                with span(self.timeline, "compute", f"{len(jobs)} experts of {layer}"):
                    expert_ffns(jobs)
                jobs = []
        places = pairs.argsort().view_as(experts)  # [T, k]
        return torch.baddbmm(shared[:, None], weights[:, None], outputs[places])[:, 0]

    def _route(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        gate, bias = self.gates[f"{layer}.gate"], self.gates.get(f"{layer}.bias")
        return route(x, gate, bias, self.spec.router, self.spec.experts_per_token)

    def before_attention(self, hidden: Tensor, layer: int, prefill: bool) -> None:
        """The last chance to guess what ``layer`` will choose: ``hidden`` lacks its attention only."""
        if self.recorder is not None and self.recorder.scores:
            self._record_guess(self.recorder, hidden, layer, 0)
        if self.predictor.gates:
            self._look_ahead(hidden, layer, 0, prefill)

    def _record(self, recorder: Recorder, hidden: Tensor, x: Tensor, layer: int, experts: Tensor) -> None:
        """Write down what ``layer`` has chosen, and on request what it and the next layers' gates make of it."""
        if not recorder.scores:
            recorder.choose(layer, experts.cpu().numpy())
            return
        gate, bias = self.gates[f"{layer}.gate"], self.gates.get(f"{layer}.bias")
        choice = score(x, gate, bias, self.spec.router)[1]
        recorder.choose(layer, experts.cpu().numpy(), choice.cpu().numpy())
        for ahead in range(1, AHEAD):
            if layer + ahead < self.spec.layers:
                self._record_guess(recorder, hidden, layer + ahead, ahead)

    def _record_guess(self, recorder: Recorder, hidden: Tensor, layer: int, ahead: int) -> None:
        gate, bias = self.gates[f"{layer}.gate"], self.gates.get(f"{layer}.bias")
        x = rms_norm(hidden, self.gates[f"{layer}.norm"], self.spec.norm_eps)
        ranked = route(x, gate, bias, self.spec.router, recorder.guessed)[1]
        recorder.guess(layer, ahead, ranked.cpu().numpy())

    def _look_ahead(self, hidden: Tensor, layer: int, ahead: int, prefill: bool) -> None:
        """Ask the predictor what ``layer`` will choose, which runs ``ahead`` layers from now, and hint at it. After the
        last layer comes the first one of the next token, which no gate can see yet."""
        wraps = layer >= self.spec.layers
        if wraps:
            layer += self.spec.dense_layers - self.spec.layers
        if (self.predictor.gates and wraps) or (prefill and not self.predictor.gates) or not self.spec.is_moe(layer):
            return
        if not self.store.prefetch.due(ahead, prefill):
            return
        began = time.perf_counter()
        if self.predictor.gates:
            x = rms_norm(hidden, self.gates[f"{layer}.norm"], self.spec.norm_eps)
            ranked = self._route(x, layer)[1].t().flatten().tolist()
            # What most rows choose comes first; among equals a row's best before its second best.
            self.predictor.observe_gate(layer, [expert for expert, _ in Counter(ranked).most_common()])
        keys = self.predictor.predict(layer)
        self.store.hint(layer, keys, ahead=ahead, passing=prefill, spent=time.perf_counter() - began)
