"""Recall and precision at m of a predictor on a trace, whether its predictions are read or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierlm.errors import UsageError
from tierlm.policies.prediction import Predictor
from tierlm.tracing.trace import Trace


@dataclass(frozen=True)
class Foresight:
    """The first ``m`` predictions made ``ahead`` layers before. ``recall``: share of the used experts among them;
    ``precision``: share of them that were used. Both over all decode tokens and layers."""

    ahead: int
    m: int
    recall: float
    precision: float


def foresee(trace: Trace, predictor: Predictor, ms: Sequence[int]) -> list[Foresight]:
    """Ask a new ``predictor`` before each layer of each decode token, as the engine does. An empty prediction counts as
    a miss. Raises UsageError if it needs routers' predictions and the trace has none."""
    if predictor.gates and trace.predictions is None:
        raise UsageError("this predictor asks the next layers' routers: it needs a trace recorded with --scores")
    numbers, layers = trace.info.moe_layers, trace.moe_layers
    aheads = range(0 if predictor.gates else 1, predictor.lookahead + 1)
    asked: dict[tuple[int, int], list[int]] = {}  # (layer, ahead) -> ranked
    right = {(ahead, m): 0 for ahead in aheads for m in ms}
    made, chosen = dict(right), dict.fromkeys(aheads, 0)

    def ask(row: int, layer: int, ahead: int) -> None:
        if predictor.gates:
            if layer >= layers or trace.predictions is None or ahead >= trace.predictions.shape[2]:
                return
            ranked = trace.predictions[row, layer, ahead]
            predictor.observe_gate(numbers[layer], ranked[ranked >= 0].tolist())
        asked[layer % layers, ahead] = [key.expert for key in predictor.predict(numbers[layer % layers])]

    for step, (start, stop) in zip(trace.passes(), trace.bounds(), strict=True):
        alone = not step.prefill and stop - start == 1
        for layer, needed in enumerate(step.needed):
            if alone and predictor.gates:
                ask(start, layer, 0)
            for ahead in aheads if alone else ():
                ranked = asked.pop((layer, ahead), [])
                chosen[ahead] += len(needed)
                for m in ms:
                    made[ahead, m] += len(ranked[:m])
                    right[ahead, m] += len(set(ranked[:m]) & set(needed))
            predictor.observe(numbers[layer], needed)
            for ahead in range(1, predictor.lookahead + 1) if alone else ():
                ask(start, layer + ahead, ahead)
    return [
        Foresight(ahead, m, right[ahead, m] / max(1, chosen[ahead]), right[ahead, m] / max(1, made[ahead, m]))
        for ahead in aheads
        for m in ms
    ]
