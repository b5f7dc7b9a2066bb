"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.config import SamplingParams


class Sampler:
    """Samples the tokens of one sequence with its own random generator."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: Tensor, *seen: Sequence[int]) -> int:
        """The next token from ``logits``, float32 [vocab]. ``seen``: prompt and generated ids, for the penalty.

        As in `transformers`, the order is: repetition penalty, temperature, top-k, top-p, min-p.
        """
        params = self.params
        if params.repetition_penalty != 1.0 and any(seen):
            index = torch.tensor(sorted(set().union(*seen)))
            values = logits[index]
            penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits = logits.scatter(0, index, penalised)
        if params.temperature == 0:
            return int(logits.argmax())
        logits = (logits - logits.max()) / params.temperature
        order = logits.argsort(descending=True, stable=True)
        probabilities = logits[order].softmax(-1)
        keep = torch.ones_like(probabilities, dtype=torch.bool)
        if params.top_k:
            keep[params.top_k :] = False
            probabilities = probabilities.where(keep, 0.0)
            probabilities = probabilities / probabilities.sum()
        if params.top_p < 1.0:
            keep &= probabilities.cumsum(0) - probabilities < params.top_p
            probabilities = probabilities.where(keep, 0.0)
            probabilities = probabilities / probabilities.sum()
        if params.min_p:
            keep &= probabilities >= params.min_p * probabilities[0]
            probabilities = probabilities.where(keep, 0.0)
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])
