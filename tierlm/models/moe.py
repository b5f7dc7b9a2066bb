"""Mixture of experts: route, acquire, compute, combine. Where the model meets the memory."""

from __future__ import annotations

import itertools
from collections import Counter

from torch import Tensor

from tierlm.checkpoints.formats import Weights, expert_ffns
from tierlm.kernels import combined
from tierlm.memory.store import Store
from tierlm.models.router import Router
from tierlm.policies.prediction import Predictor
from tierlm.spec import ModelSpec
from tierlm.timeline import Timeline, span
from tierlm.tracing.recorder import AHEAD, Recorder


class MixtureOfExperts:
    """The MoE part of all layers."""

    def __init__(
        self,
        spec: ModelSpec,
        router: Router,
        store: Store,
        predictor: Predictor,
        timeline: Timeline | None = None,
        recorder: Recorder | None = None,
    ):
        self.spec, self.router, self.store, self.predictor = spec, router, store, predictor
        self.timeline, self.recorder = timeline, recorder
        self._shared = spec.moe is not None and spec.moe.shared_width > 0
        self._place = {layer: at for at, layer in enumerate(spec.moe_layers)}

    def forward(self, hidden: Tensor, x: Tensor, layer: int, trunk: Weights, prefill: bool) -> Tensor:
        """``hidden`` is the residual stream, ``x`` its norm, float32 [T, hidden] both; returns the stream with this
        layer's experts.

        The (token, choice) pairs are grouped by expert, each expert's rows computed together; the sum over the choices
        runs in the router's order, so that the order in which experts arrive does not reach the result. The shared
        expert is computed with those that are there at once, while the rest is read.
        """
        targets = [(self._target(layer, ahead, prefill), ahead) for ahead in range(1, self.predictor.lookahead + 1)]
        hints = [(target, ahead) for target, ahead in targets if target is not None]
        gates = [target for target, _ in hints if self.predictor.gates]
        weights, experts, guesses = self.router.route_ahead(x, layer, hidden, gates)
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
            self.predictor.observe(layer, needed)
            for (target, ahead), guess in itertools.zip_longest(hints, guesses):
                self._hint(target, ahead, prefill, guess)
            jobs: list[tuple[Tensor, Tensor, Weights]] = [(x, shared, trunk)]
            if not self._shared:
                shared.zero_()
                jobs = []
            for batch in leases:
                for expert, record in batch:
                    mine = pairs[expert]
                    rows = x if x.shape[0] == 1 else x[[pair // chosen for pair in mine]]
                    jobs.append((rows, outputs[ends[expert] - len(mine) : ends[expert]], record))
                with span(self.timeline, "compute", f"{len(jobs)} experts of {layer}"):
                    expert_ffns(jobs)
                jobs = []
        places = [0] * experts.numel()
        for place, pair in enumerate(itertools.chain.from_iterable(pairs[expert] for expert in needed)):
            places[pair] = place
        return combined(hidden, shared, weights, outputs, places)

    def before_attention(self, hidden: Tensor, layer: int, prefill: bool) -> None:
        """The last chance to guess what ``layer`` will choose: ``hidden`` lacks its attention only."""
        if self.recorder is not None and self.recorder.scores:
            self._record_guess(self.recorder, hidden, layer, 0)
        if self.predictor.gates and self._target(layer, 0, prefill) is not None:
            self._hint(layer, 0, prefill, self.router.rank(hidden, layer, self.spec.experts_per_token))

    def _record(self, recorder: Recorder, hidden: Tensor, x: Tensor, layer: int, experts: Tensor) -> None:
        """Write down what ``layer`` has chosen, and on request what it and the next layers' gates make of it."""
        if not recorder.scores:
            recorder.choose(layer, experts.cpu().numpy())
            return
        recorder.choose(layer, experts.cpu().numpy(), self.router.score(x, layer)[1].cpu().numpy())
        following = self.spec.moe_layers[self._place[layer] + 1 :]
        for ahead, later in enumerate(following[: AHEAD - 1], 1):
            self._record_guess(recorder, hidden, later, ahead)

    def _record_guess(self, recorder: Recorder, hidden: Tensor, layer: int, ahead: int) -> None:
        recorder.guess(layer, ahead, self.router.rank(hidden, layer, recorder.guessed).cpu().numpy())

    def _target(self, layer: int, ahead: int, prefill: bool) -> int | None:
        """The MoE layer that runs ``ahead`` MoE layers from ``layer``, if the predictor shall be asked about it now.
        After the last one comes the first one of the next token, which no gate can see yet."""
        layers, place = self.spec.moe_layers, self._place[layer] + ahead
        if self.predictor.gates:
            if place >= len(layers):
                return None
        elif prefill:
            return None
        return layers[place % len(layers)] if self.store.prefetch.due(ahead, prefill) else None

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
