"""Mixture of experts: route, acquire, compute, combine. Where the model meets the memory."""

from __future__ import annotations

import itertools

from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import combined, gated_mlps
from tierlm.memory.store import Store
from tierlm.models.routing import Routers
from tierlm.spec import ModelSpec
from tierlm.timeline import Timeline, span
from tierlm.tracing.recorder import AHEAD, Recorder


class MixtureOfExperts:
    """The MoE part of all layers."""

    def __init__(
        self,
        spec: ModelSpec,
        routers: Routers,
        store: Store,
        timeline: Timeline | None = None,
        recorder: Recorder | None = None,
    ):
        self.spec, self.routers, self.store = spec, routers, store
        self.timeline, self.recorder = timeline, recorder

    def forward(self, hidden: Tensor, x: Tensor, layer: int, trunk: Weights, prefill: bool) -> Tensor:
        """``hidden`` is the residual stream, ``x`` its norm, float32 [T, hidden] both; returns the stream with this
        layer's experts.

        The (token, choice) pairs are grouped by expert, each expert's rows computed together; the sum over the choices
        runs in the router's order, so that the order in which experts arrive does not reach the result. The shared
        expert is computed with those that are there at once, while the rest is read.
        """
        lookahead = self.store.lookahead
        targets = lookahead.targets(layer, prefill)
        asked = [target for target, _ in targets] if lookahead.predictor.gates else []
        weights, experts, rankings = self.routers.route_ahead(x, layer, hidden, asked)
        if self.recorder is not None:
            self._record(self.recorder, hidden, x, layer, experts)
        chosen = experts.shape[1]
        pairs: dict[int, list[int]] = {}  # by expert, in order
        for pair, expert in enumerate(experts.flatten().tolist()):
            pairs.setdefault(expert, []).append(pair)
        needed = sorted(pairs)
        ends = dict(zip(needed, itertools.accumulate(len(pairs[expert]) for expert in needed), strict=True))
        outputs = x.new_empty(experts.numel() + x.shape[0], x.shape[1])
        shared = outputs[experts.numel() :]
        with self.store.acquire(layer, needed, streaming=prefill) as leases:
            lookahead.predictor.observe(layer, needed)
            for (target, ahead), ranked in itertools.zip_longest(targets, rankings):
                self.store.look_ahead(target, ahead, prefill, None if ranked is None else ranked.tolist())
            jobs: list[tuple[Tensor, Tensor, Weights]] = [(x, shared, trunk)]
            if not self.spec.shared_experts:
                shared.zero_()
                jobs = []
            for batch in leases:
                for expert, record in batch:
                    mine = pairs[expert]
                    rows = x if x.shape[0] == 1 else x[[pair // chosen for pair in mine]]
                    jobs.append((rows, outputs[ends[expert] - len(mine) : ends[expert]], record))
                with span(self.timeline, "compute", f"{len(jobs)} experts of {layer}"):
                    gated_mlps([(x, y, (w["gate_proj"], w["up_proj"], w["down_proj"])) for x, y, w in jobs])
                jobs = []
        places = [0] * experts.numel()
        for place, pair in enumerate(itertools.chain.from_iterable(pairs[expert] for expert in needed)):
            places[pair] = place
        return combined(hidden, shared, weights, outputs, places)

    def before_attention(self, hidden: Tensor, layer: int, prefill: bool) -> None:
        """The last chance to predict what ``layer`` demands: ``hidden`` lacks its attention only."""
        if self.recorder is not None and self.recorder.scores:
            self._record_guess(self.recorder, hidden, layer, 0)
        if self.store.lookahead.before_attention(prefill):
            ranked = self.routers.guess(hidden, layer, self.spec.experts_per_token)
            self.store.look_ahead(layer, 0, prefill, ranked.tolist())

    def _record(self, recorder: Recorder, hidden: Tensor, x: Tensor, layer: int, experts: Tensor) -> None:
        """Write down what ``layer`` has chosen, and on request what it and the next layers' gates make of it."""
        if not recorder.scores:
            recorder.choose(layer, experts.cpu().numpy())
            return
        recorder.choose(layer, experts.cpu().numpy(), self.routers.score(x, layer)[1].cpu().numpy())
        later = self.spec.moe_layers[self.spec.moe_layers.index(layer) + 1 :]
        for ahead, target in enumerate(later[: AHEAD - 1], 1):
            self._record_guess(recorder, hidden, target, ahead)

    def _record_guess(self, recorder: Recorder, hidden: Tensor, layer: int, ahead: int) -> None:
        recorder.guess(layer, ahead, self.routers.guess(hidden, layer, recorder.guessed).cpu().numpy())
