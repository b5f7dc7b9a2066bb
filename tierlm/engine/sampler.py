"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.config import SamplingParams

LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny  # below it, a division gives NaN


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural log of a generated token's probability, and those of the most likely tokens, likeliest first.

    They come from the model's own logits: penalties, bias, temperature and filters do not change them.
    """

    id: int
    logprob: float
    top: Mapping[int, float]


class Sampler:
    """Samples the tokens of one sequence with its own random generator."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._constraint = None if params.constraint is None else params.constraint()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> int:
        """The next token from ``logits``, float32 [vocab]. The penalties use the ids so far.

        The order is: bias, repetition penalty, frequency and presence penalty, constraint, temperature, top-k, top-p,
        min-p. Raises UsageError if the constraint cannot go on.
        """
        params, logits = self.params, self._adjusted(logits, prompt, generated)
        if params.temperature < LEAST_TEMPERATURE:
            return int(logits.numpy().argmax())  # torch would wake its own threads
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

    def _adjusted(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
        """Logits with bias, penalties and constraint, in a new tensor if there are any. [vocab]"""
        params = self.params
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._bias)
        if params.repetition_penalty != 1.0 and (prompt or generated):
            seen = torch.tensor(sorted({*prompt, *generated}))
            values = logits[seen]
            penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits = logits.scatter(0, seen, penalised)
        if (params.frequency_penalty or params.presence_penalty) and generated:
            times = torch.tensor(generated).bincount(minlength=len(logits)).to(logits.dtype)
            logits = logits - params.frequency_penalty * times - params.presence_penalty * times.clamp(max=1)
        if self._constraint is not None and (allowed := self._constraint.mask(generated)) is not None:
            logits = logits.where(allowed, -torch.inf)
        return logits


def logprob_of(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """The log probability of ``token``, and those of the ``count`` most likely. ``logits``: float32 [vocab]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))
