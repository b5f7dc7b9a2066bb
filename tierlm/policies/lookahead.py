"""Lookahead: which layers to ask the predictor about, when, and what to read of its predictions."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Container, Sequence

from tierlm.policies.prediction import Predictor
from tierlm.policies.prefetch import Measured, Prefetch
from tierlm.spec import ExpertKey, Key


class Lookahead:
    """``layers``: the numbers of the MoE layers, in the order in which they run.

    A target is asked about ``ahead`` MoE layers before it runs: 1 or more while another layer runs its experts, 0 just
    before its own attention. For each, the caller calls ``predict``, then ``choose`` with the keys that are absent, and
    starts the reads that ``next_read`` gives, as far as there are slots, whenever a slot may have become free.
    """

    def __init__(self, predictor: Predictor, layers: Sequence[int], prefetch: Prefetch | None = None):
        self.predictor, self.prefetch = predictor, prefetch or Measured()
        self._following = {layer: self._layers_after(at, layers) for at, layer in enumerate(layers)}
        self._pending: dict[int, tuple[list[ExpertKey], bool]] = {}  # by layer: reads to start; whether they stream

    def _layers_after(self, at: int, layers: Sequence[int]) -> list[tuple[int, int]]:
        """(target, ahead) for the layer at ``at``. The first layer follows the last, at the next token, whose hidden
        state no gate can see yet."""
        aheads = range(1, self.predictor.lookahead + 1)
        wanted = [(at + ahead, ahead) for ahead in aheads if at + ahead < len(layers) or not self.predictor.gates]
        return [(layers[place % len(layers)], ahead) for place, ahead in wanted]

    def targets(self, layer: int, prefill: bool) -> list[tuple[int, int]]:
        """(target, ahead) to ask about while ``layer`` runs its experts; settled before it demands them. A prefill asks
        gates only."""
        if prefill and not self.predictor.gates:
            return []
        return [target for target in self._following[layer] if self.prefetch.due(target[1], prefill)]

    def before_attention(self, prefill: bool) -> bool:
        """Whether to ask a layer's gate just before its attention."""
        return self.predictor.gates and self.prefetch.due(0, prefill)

    def predict(self, layer: int, rows: Sequence[Sequence[int]] | None = None) -> list[ExpertKey]:
        """What ``layer`` is likely to demand, the likeliest first. ``rows``: [T, k] what its gate ranks first for each
        token, if the predictor goes by gates; what most tokens choose comes first, and among equals a token's best
        before its second best."""
        if rows is not None:
            ranked = list(rows[0])
            if len(rows) > 1:
                votes = Counter(itertools.chain.from_iterable(zip(*rows, strict=True)))
                ranked = [expert for expert, _ in votes.most_common()]
            self.predictor.observe_gate(layer, ranked)
        return self.predictor.predict(layer)

    def choose(
        self, layer: int, absent: Sequence[ExpertKey], ahead: int, prefill: bool, backlog: float
    ) -> list[ExpertKey]:
        """Those of ``absent``, the predicted records of ``layer`` that must be read, that are worth a read.

        ``backlog``: records that the link has to read for demands first. Where nothing is absent there is nothing to
        choose or to judge: precision and the time until the layer runs are averaged over predictions that could have
        been read.
        """
        return self.prefetch.choose(layer, absent, ahead, prefill, backlog) if absent else []

    def plan(self, layer: int, chosen: list[ExpertKey], streaming: bool) -> None:
        """``chosen`` are to be read, in this order, instead of what was planned for ``layer`` before."""
        self._pending[layer] = chosen, streaming

    def next_read(self, present: Container[Key]) -> tuple[ExpertKey, bool] | None:
        """The planned read to start next, and whether it streams; the next layer's first, without the ``present``."""
        for keys, streaming in self._pending.values():
            while keys:
                if keys[0] not in present:
                    return keys[0], streaming
                keys.pop(0)
        return None

    def turn(self, layer: int, needed: Collection[ExpertKey]) -> None:
        """``layer`` runs now and demands ``needed``: judge what was predicted, forget what was planned."""
        self.prefetch.turn(layer, needed)
        self._pending.pop(layer, None)
