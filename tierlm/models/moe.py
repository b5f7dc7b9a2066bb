"""Mixture of experts: route, acquire, compute, combine. Where the model meets the memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.checkpoints.formats import Weights, expert_ffns
from tierlm.kernels import Groups, combined, grouped
from tierlm.memory.store import Leases, Store
from tierlm.models.routing import Routers
from tierlm.policies.prediction import Predictor
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
        predictor: Predictor,
        timeline: Timeline | None = None,
        recorder: Recorder | None = None,
    ):
        self.spec, self.routers, self.store, self.predictor = spec, routers, store, predictor
        self.timeline, self.recorder = timeline, recorder

    def forward(self, hidden: Tensor, x: Tensor, layer: int, trunk: Weights, prefill: bool) -> Tensor:
        """``hidden`` is the residual stream, ``x`` its norm, float32 [T, hidden] both; returns the stream with this
        layer's experts.

        Each expert computes the rows of all tokens that chose it. The sum over a token's choices runs in the router's
        order, so the order in which experts arrive does not reach the result.
        """
        later = self._later(layer, prefill)
        gates = [target for target, _ in later if self.predictor.gates]
        weights, experts, ranked = self.routers.route_ahead(x, layer, hidden, gates)  # [T, k] both
        groups = grouped(experts, self.spec.experts)
        if self.recorder is not None:
            self._record(self.recorder, hidden, x, layer, experts)
        with self.store.acquire(layer, groups.experts, streaming=prefill) as leases:
            self._predict(layer, groups.experts, later, ranked, prefill)
            outputs, shared = self._compute(x, layer, trunk, groups, leases)  # [T * k, hidden], [T, hidden]
        return combined(hidden, shared, weights, outputs, groups.inverse)

    def _compute(
        self, x: Tensor, layer: int, trunk: Weights, groups: Groups, leases: Leases
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs of the routed experts, by expert, and of the shared expert if there is one. The shared expert is
        computed with the resident ones, while the others are read."""
        outputs = x.new_empty(len(groups.order), x.shape[1])  # [T * k, hidden]
        places = zip(_rows(x, groups), outputs.split_with_sizes(groups.counts), strict=True)  # [n, hidden] both
        mine = dict(zip(groups.experts, places, strict=True))
        shared = torch.empty_like(x) if self.spec.shared_experts else None
        jobs = [] if shared is None else [(x, shared, trunk)]
        for batch in itertools.chain((leases.resident(),), leases):
            jobs += [(*mine[expert], record) for expert, record in batch]
            with span(self.timeline, "compute", f"{len(jobs)} experts of {layer}"):
                expert_ffns(jobs)
            jobs = []
        return outputs, shared

    def before_attention(self, hidden: Tensor, layer: int, prefill: bool) -> None:
        """The last chance to guess what ``layer`` will choose: ``hidden`` lacks its attention only."""
        if self.recorder is not None and self.recorder.scores:
            self._record_guess(self.recorder, hidden, layer, 0)
        if self.predictor.gates and self._target(layer, 0, prefill) is not None:
            self._hint(layer, 0, prefill, self.routers.guess(hidden, layer, self.spec.experts_per_token))

    def _record(self, recorder: Recorder, hidden: Tensor, x: Tensor, layer: int, experts: Tensor) -> None:
        """Write down what ``layer`` has chosen, and on request what it and the next layers' gates make of it."""
        if not recorder.scores:
            recorder.choose(layer, experts.cpu().numpy())
            return
        recorder.choose(layer, experts.cpu().numpy(), self.routers.score(x, layer)[1].cpu().numpy())
        for ahead in range(1, AHEAD):
            if layer + ahead < self.spec.layers:
                self._record_guess(recorder, hidden, layer + ahead, ahead)

    def _record_guess(self, recorder: Recorder, hidden: Tensor, layer: int, ahead: int) -> None:
        recorder.guess(layer, ahead, self.routers.guess(hidden, layer, recorder.guessed).cpu().numpy())

    def _later(self, layer: int, prefill: bool) -> list[tuple[int, int]]:
        """The layers that the predictor is asked about while ``layer`` runs, and how many layers ahead each is."""
        later = [(self._target(layer, ahead, prefill), ahead) for ahead in range(1, self.predictor.lookahead + 1)]
        return [(target, ahead) for target, ahead in later if target is not None]

    def _predict(
        self, layer: int, experts: list[int], later: list[tuple[int, int]], ranked: list[Tensor], prefill: bool
    ) -> None:
        """``layer`` has chosen ``experts``: tell the predictor, and ask it about the ``later`` layers. ``ranked``: what
        their gates rank first, if the predictor goes by gates."""
        self.predictor.observe(layer, experts)
        for (target, ahead), first in itertools.zip_longest(later, ranked):
            self._hint(target, ahead, prefill, first)

    def _target(self, layer: int, ahead: int, prefill: bool) -> int | None:
        """The layer that runs ``ahead`` layers from ``layer``, if the predictor shall be asked about it now. After the
        last layer comes the first one of the next token, which no gate can see yet."""
        target = layer + ahead
        wraps = target >= self.spec.layers
        if wraps:
            target += self.spec.dense_layers - self.spec.layers
        if (self.predictor.gates and wraps) or (prefill and not self.predictor.gates) or not self.spec.is_moe(target):
            return None
        return target if self.store.prefetch.due(ahead, prefill) else None

    def _hint(self, layer: int, ahead: int, prefill: bool, guess: Tensor | None) -> None:
        """Ask the predictor what ``layer`` will choose, which runs ``ahead`` layers from now, and hint at it.

        ``guess``: what its gate makes of the hidden state as it is now, if the predictor goes by gates."""
        if guess is not None:
            ranked, *others = guess.tolist()
            if others:  # what most rows choose comes first; among equals a row's best before its second best
                together = Counter(itertools.chain.from_iterable(zip(ranked, *others, strict=True)))
                ranked = [expert for expert, _ in together.most_common()]
            self.predictor.observe_gate(layer, ranked)
        self.store.hint(layer, self.predictor.predict(layer), ahead=ahead, streaming=prefill)


def _rows(x: Tensor, groups: Groups) -> Sequence[Tensor]:
    """The rows of ``x`` [T, hidden] that each expert takes, [n, hidden]."""
    chosen = groups.inverse.shape[1]
    if len(x) == 1:
        return [x] * chosen
    return x.index_select(0, groups.order // chosen).split_with_sizes(groups.counts)
