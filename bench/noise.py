"""Random weights that behave: hidden states and logits of order one at any depth, and routing as requested.

Matrices are normal with variance 1 / inputs. Those that write to the residual stream are scaled by the depth, so that
all layers together add about as much as the embedding.

Greedy decoding counts: the head prefers the id after the current one. A random model would soon loop over a few tokens
and repeat its routing; this one meets a new embedding at every step until the vocabulary ends. And its text does not
depend on rounding, so every engine computes the same tokens. Other logits are noise.

The first TOPICS coordinates of the residual stream carry only the current token's topic: the embedding sets the
coordinate of its token's topic, which RUN consecutive ids share, and no layer writes there. A router's columns for
these coordinates are therefore a bias that depends on the topic alone. Their common part makes experts hot if the
router has no bias of its own (V2's softmax); the part that differs between topics makes consecutive tokens choose
alike. Everything is in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from popularity import fit_bias, fit_common, router_of
from torch import Tensor
from torch.nn import functional

from tierlm.models import family_of
from tierlm.spec import ExpertKey, ModelSpec, TrunkKey

TOPICS = 16
RUN = 10  # ids in a row that share a topic
LEVEL = 4.0  # of the current topic's coordinate; the others have spread one
NEXT = 20.0  # of the logit of the next id, before the final norm; the largest of 100,000 others is about 5
GROWTH = 1.0  # variance that all layers add to the embedding's variance of one, measured on toys


class Noise:
    """The tensors of a model of ``spec``. ``skew``: exponent of the experts' popularity by rank. ``stickiness``: P(the
    next token chooses an expert again); 0: left to chance. Raises ValueError for an impossible one."""

    def __init__(self, spec: ModelSpec, skew: float = 0.0, stickiness: float = 0.0, seed: int = 0):
        torch.manual_seed(seed)
        self.spec = spec
        self.bias = fit_bias(spec, skew)
        self.common = fit_common(spec, self.bias, stickiness, stay=1 - 1 / RUN)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model, layer by layer, expert by expert: bfloat16, correction biases float32."""
        spec = self.spec
        family = family_of(spec.model_type, "synthetic")
        resident = family.resident_tensors(spec)
        embedding = self._embedding()
        yield family.embedding_name(), embedding
        for layer in range(len(spec.layers)):
            groups = [family.trunk_tensors(spec, TrunkKey(layer))]
            if layer in spec.moe_layers:
                groups += [family.expert_tensors(spec, ExpertKey(layer, expert)) for expert in range(spec.experts)]
            for group in groups:
                for role, (name, shape) in group.items():
                    yield name, self._matrix(role, shape)
            yield resident[f"{layer}.norm"][0], torch.ones(spec.hidden, dtype=torch.bfloat16)
            if layer in spec.moe_layers:
                router, bias = self._router(layer)
                yield resident[f"{layer}.router"][0], router
                if f"{layer}.correction" in resident:
                    yield resident[f"{layer}.correction"][0], bias
        yield resident["norm"][0], torch.ones(spec.hidden, dtype=torch.bfloat16)
        yield family.head_name(spec), self._head(embedding)

    def _matrix(self, role: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)  # a norm
        if role not in ("o_proj", "down_proj"):
            return _normal(shape, shape[1] ** -0.5)
        writer = _normal(shape, (2 / len(self.spec.layers) / shape[1]) ** 0.5)
        writer[:TOPICS] = 0
        return writer

    def _spread(self, layer: int) -> float:
        """The root mean square of the residual stream that enters ``layer``; its norm divides by it."""
        return math.sqrt(1 + LEVEL**2 / self.spec.hidden + GROWTH * layer / len(self.spec.layers))

    def _embedding(self) -> Tensor:
        table = _normal((self.spec.vocab, self.spec.hidden), 1.0)
        table[:, :TOPICS] = LEVEL * self._topics()
        return table

    def _head(self, embedding: Tensor) -> Tensor:
        """Logits of variance one, except the next id's. Row by row, since the table may be two gigabytes."""
        head = _normal(tuple(embedding.shape), self.spec.hidden**-0.5)
        for token in range(self.spec.vocab):
            head[token] += NEXT / self.spec.hidden * embedding[token - 1]
        head[:, :TOPICS] = 0
        return head

    def _topics(self) -> Tensor:
        """The topic of each token, one-hot, bfloat16 [vocab, TOPICS]."""
        number = torch.arange(self.spec.vocab) // RUN % TOPICS
        return functional.one_hot(number, TOPICS).bfloat16()

    def _router(self, layer: int) -> tuple[Tensor, Tensor]:
        """The router [experts, hidden], and the correction bias [experts]; hot experts differ between layers."""
        spec = self.spec
        rule = router_of(spec)
        rows = self.bias.view(rule.groups, -1)[torch.randperm(rule.groups)]
        bias = torch.cat([row[torch.randperm(len(row))] for row in rows])
        gate = _normal((spec.experts, spec.hidden), ((1 - self.common) / spec.hidden) ** 0.5)
        by_topic = self.common**0.5 * torch.randn(spec.experts, TOPICS)
        if not rule.correction:
            by_topic += bias[:, None]
        gate[:, :TOPICS] = by_topic * self._spread(layer) / LEVEL
        return gate, bias


def _normal(shape: tuple[int, ...], spread: float) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread)
