"""Mixture of experts, where the model meets the memory: route, acquire, compute, combine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import Groups, clamped_mlp, combined, gated_mlps, glu_mlp, grouped, linear
from tierlm.memory.store import Leases, Store
from tierlm.models.layers import rms_norm
from tierlm.models.router import Router
from tierlm.spec import ModelSpec, Moe
from tierlm.timeline import Timeline, span
from tierlm.tracing.recorder import AHEAD, Recorder


class MixtureOfExperts:
    """The MoE block of all layers."""

    def __init__(
        self,
        spec: ModelSpec,
        router: Router,
        store: Store,
        timeline: Timeline | None = None,
        recorder: Recorder | None = None,
    ):
        self.spec, self.router, self.store = spec, router, store
        self.timeline, self.recorder = timeline, recorder
        self._shared = spec.moe is not None and spec.moe.shared_width > 0
        self._beside = spec.moe is not None and spec.moe.beside
        self._expert = None if spec.moe is None else expert_of(spec.moe)
        self._normed = partial(rms_norm, eps=spec.norm_eps)

    def forward(self, hidden: Tensor, x: Tensor, layer: int, trunk: Weights, prefill: bool) -> Tensor:
        """Residual stream ``hidden`` and its norm ``x``, both float32 [T, hidden] -> residual stream plus experts.

        Each expert computes the rows of all its tokens. Outputs are summed in the router's order, so the order in
        which experts arrive does not affect the result.
        """
        lookahead = self.store.lookahead
        targets = lookahead.targets(layer, prefill)
        asked = [target for target, _ in targets] if lookahead.predictor.gates else []
        routed = self.router.normed(hidden, x, layer)
        weights, experts, rankings = self.router.route_ahead(routed, layer, hidden, asked)  # [T, k] both
        groups = grouped(experts, self.spec.experts)
        if self.recorder is not None:
            self._record(self.recorder, hidden, routed, layer, experts)
        with self.store.acquire(layer, groups.experts, streaming=prefill) as leases:
            lookahead.predictor.observe(layer, groups.experts)
            for (target, ahead), ranked in itertools.zip_longest(targets, rankings):
                self.store.look_ahead(target, ahead, prefill, None if ranked is None else ranked.tolist())
            inputs = self._normed(hidden, trunk["experts_norm"]) if self._beside else x
            outputs, shared = self._compute(x, inputs, layer, trunk, groups, leases)  # [T * k, hidden], [T, hidden]
        if shared is not None and (gate := trunk.get("shared_gate")) is not None:
            shared *= linear(x, gate).sigmoid_()  # [T, 1]
        if self._beside and shared is not None:
            mixed = combined(torch.zeros_like(hidden), None, weights, outputs, groups.inverse)
            added = self._normed(shared, trunk["shared_out_norm"]) + self._normed(mixed, trunk["experts_out_norm"])
            return hidden + self._normed(added, trunk["feed_forward_norm"])
        return combined(hidden, shared, weights, outputs, groups.inverse)

    def _compute(
        self, x: Tensor, inputs: Tensor, layer: int, trunk: Weights, groups: Groups, leases: Leases
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs of the routed experts for ``inputs``, by expert, and of the shared expert, if any, for ``x``. The
        shared expert runs with the resident experts, while the others are read."""
        outputs = x.new_empty(len(groups.order), x.shape[1])  # [T * k, hidden]
        places = zip(_rows(inputs, groups), outputs.split_with_sizes(groups.counts), strict=True)  # [n, hidden] both
        mine = dict(zip(groups.experts, places, strict=True))
        shared = torch.empty_like(x) if self._shared else None
        jobs = [] if shared is None else [(x, shared, trunk)]
        for batch in itertools.chain((leases.resident(),), leases):
            jobs += [(*mine[expert], record) for expert, record in batch]
            with span(self.timeline, "compute", f"{len(jobs)} experts of {layer}"):
                if self._expert is not None:
                    for rows, out, record in jobs:
                        out.copy_(self._expert(rows, record))
                else:
                    gated_mlps([(rows, out, (w["gate_proj"], w["up_proj"], w["down_proj"])) for rows, out, w in jobs])
            jobs = []
        return outputs, shared

    def before_attention(self, hidden: Tensor, layer: int, prefill: bool) -> None:
        """Late prediction of ``layer``'s own experts: ``hidden`` lacks only its attention."""
        if self.recorder is not None and self.recorder.scores:
            self._record_prediction(self.recorder, hidden, layer, 0)
        if self.store.lookahead.before_attention(prefill):
            ranked = self.router.rank(hidden, layer, self.spec.experts_per_token)
            self.store.look_ahead(layer, 0, prefill, ranked.tolist())

    def _record(self, recorder: Recorder, hidden: Tensor, x: Tensor, layer: int, experts: Tensor) -> None:
        """Record the experts of ``layer`` and, on request, its scores and the rankings by the next layers' routers."""
        scores = self.router.score(x, layer)[1].cpu().numpy() if recorder.scores else None
        recorder.choose(layer, experts.cpu().numpy(), scores)
        if not recorder.scores:
            return
        later = self.spec.moe_layers[self.spec.moe_layers.index(layer) + 1 :]
        for ahead, target in enumerate(later[: AHEAD - 1], 1):
            self._record_prediction(recorder, hidden, target, ahead)

    def _record_prediction(self, recorder: Recorder, hidden: Tensor, layer: int, ahead: int) -> None:
        recorder.predict(layer, ahead, self.router.rank(hidden, layer, recorder.ranked).cpu().numpy())


def expert_of(moe: Moe) -> Callable[[Tensor, Weights], Tensor] | None:
    """The arithmetic of an expert, float32 [n, hidden] -> float32 [n, hidden]; None: ``gated_mlps``."""
    if moe.clamped:
        return partial(clamped_mlp, transposed=moe.transposed)
    return partial(glu_mlp, gelu=moe.gelu, transposed=moe.transposed) if moe.stacked or moe.gelu else None


def _rows(x: Tensor, groups: Groups) -> Sequence[Tensor]:
    """Each expert's rows of ``x`` [T, hidden]: [n, hidden]."""
    chosen = groups.inverse.shape[1]
    if len(x) == 1:
        return [x] * chosen
    return x.index_select(0, groups.order // chosen).split_with_sizes(groups.counts)
