"""How well a predictor foresees a trace: recall and precision at m, whatever is done with the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierlm.errors import UsageError
from tierlm.policies.prediction import Predictor
from tierlm.tracing.trace import Trace


@dataclass(frozen=True)
class Foresight:
    """Of the first ``m`` predictions ``ahead`` layers before. ``recall``: the share of the chosen experts among them; ``precision``, the share of them that were chosen. Both over all decode tokens and layers."""

    ahead: int
    m: int
    recall: float
    precision: float


def foresee(trace: Trace, predictor: Predictor, ms: Sequence[int]) -> list[Foresight]:
    """Ask ``predictor``, which is used up, before each layer of each decode token as the engine does. What a predictor
    says nothing about counts as missed. Raises UsageError where it needs gates and the trace has no predictions."""
    if predictor.gates and trace.predictions is None:
        raise UsageError("this predictor asks the next layers' gates: it needs a trace recorded with --scores")
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
