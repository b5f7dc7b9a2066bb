"""Lookahead: which layers to predict, when, and which predictions to read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Container, Sequence

from tierlm.policies.prediction import Predictor
from tierlm.policies.prefetch import Measured, Prefetch
from tierlm.spec import ExpertKey, Key


class Lookahead:
    """``layers``: the numbers of the MoE layers, in running order.

    A target layer is predicted ``ahead`` MoE layers before it runs: 1 or more while another layer runs its experts, 0
    just before its own attention. For each target the caller calls ``predict``, ``choose`` with the absent keys, and
    ``plan``. Whenever a slot may be free, it starts the reads that ``next_read`` returns.
    """

    def __init__(self, predictor: Predictor, layers: Sequence[int], prefetch: Prefetch | None = None):
        self.predictor, self.prefetch = predictor, prefetch or Measured()
        self._following = {layer: self._layers_after(at, layers) for at, layer in enumerate(layers)}
        self._pending: dict[int, tuple[list[ExpertKey], bool]] = {}  # by layer: reads to start, streaming

    def _layers_after(self, at: int, layers: Sequence[int]) -> list[tuple[int, int]]:
        """(target, ahead) for the layer at ``at``. After the last layer comes the first layer of the next token; no
        router can see that token's hidden state yet."""
        aheads = range(1, self.predictor.lookahead + 1)
        wanted = [(at + ahead, ahead) for ahead in aheads if at + ahead < len(layers) or not self.predictor.gates]
        return [(layers[place % len(layers)], ahead) for place, ahead in wanted]

    def targets(self, layer: int, prefill: bool) -> list[tuple[int, int]]:
        """(target, ahead) to predict while ``layer`` runs its experts; call it before ``layer`` demands them. A prefill
        asks routers only."""
        if prefill and not self.predictor.gates:
            return []
        return [target for target in self._following[layer] if self.prefetch.due(target[1], prefill)]

    def before_attention(self, prefill: bool) -> bool:
        """Whether to ask a layer's router just before its attention."""
        return self.predictor.gates and self.prefetch.due(0, prefill)

    def predict(self, layer: int, rows: Sequence[Sequence[int]] | None = None) -> list[ExpertKey]:
        """The records that ``layer`` will probably demand, the likeliest first. ``rows``: [T, k] the experts that its
        router ranks first for each token, for a predictor with ``gates``. Experts are ordered by the number of tokens,
        then by rank."""
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
        """The ``absent`` predicted records of ``layer`` worth a read. ``backlog``: demands queued on the link. Without
        absent records the prediction is not judged: averages cover only predictions that could be read."""
        return self.prefetch.choose(layer, absent, ahead, prefill, backlog) if absent else []

    def plan(self, layer: int, chosen: list[ExpertKey], streaming: bool) -> None:
        """Read ``chosen`` in this order; replaces the plan for ``layer``."""
        self._pending[layer] = chosen, streaming

    def next_read(self, present: Container[Key]) -> tuple[ExpertKey, bool] | None:
        """The planned read to start next, earliest plan first, and whether it streams; skips keys in ``present``."""
        for keys, streaming in self._pending.values():
            while keys:
                if keys[0] not in present:
                    return keys[0], streaming
                keys.pop(0)
        return None

    def turn(self, layer: int, needed: Collection[ExpertKey]) -> None:
        """``layer`` runs now and demands ``needed``: judge its predictions and drop its plan."""
        self.prefetch.turn(layer, needed)
        self._pending.pop(layer, None)
