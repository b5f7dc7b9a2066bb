"""Random weights that behave: hidden states and logits of order one at any depth, and routing as requested.

Matrices are normal with variance 1 / inputs. Those that write to the residual stream are scaled by the depth, so that
all layers together add about as much as the embedding, and routed experts by the router's weights, so that a token's
experts add as much as its shared ones.

Greedy decoding goes through the vocabulary, a block of CHOICES ids a step. The ids of a block share a direction in the
embedding, and the head adds NEXT to the ids of the block after it. A random model would soon loop over a few tokens and
repeat its routing; this one meets a new embedding at every step until the vocabulary ends. The other logits are noise
from the whole residual stream, so all layers together choose the id within the block: an error in any of them soon
changes the text. Rounding may change it too, but seldom, where two ids of a block are nearly tied.

The first TOPICS coordinates of the residual stream carry only the current token's topic: the embedding sets the
coordinate of its token's topic, which RUN consecutive blocks share, and no layer writes there. A router's columns for
these coordinates are therefore a bias that depends on the topic alone. Their common part makes experts hot if the
router has no bias of its own (V2's softmax); the part that differs between topics makes consecutive tokens choose
alike. Everything is in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from popularity import expert_gain, fit_bias, fit_common, router_of
from torch import Tensor
from torch.nn import functional

from tierlm.models import family_of
from tierlm.spec import ExpertKey, ModelSpec, TrunkKey

TOPICS = 16
RUN = 10  # blocks in a row that share a topic
CHOICES = 8  # ids of a block
SHARED = 0.75  # of an embedding's variance, by the ids of its block
LEVEL = 4.0  # of the current topic's coordinate; the others have spread one
NEXT = 20.0  # of the next block's logits, before the final norm; the largest of 100,000 others is about 5
GROWTH = 1.0  # variance that all layers add to the embedding's variance of one, measured on toys


class Noise:
    """The tensors of a model of ``spec``. ``skew``: exponent of the experts' popularity by rank. ``stickiness``: P(the
    next token chooses an expert again); 0: left to chance. ``variety``: different experts have but so many different
    matrices, which then are the same objects; 0: all differ. Raises ValueError for an impossible stickiness."""

    def __init__(self, spec: ModelSpec, skew: float = 0.0, stickiness: float = 0.0, seed: int = 0, variety: int = 0):
        torch.manual_seed(seed)
        self.spec = spec
        self.variety = variety
        self.drawn: dict[tuple[str, int], Tensor] = {}  # (role, which of the variety) -> an expert's matrix
        self.bias = fit_bias(spec, skew)
        self.common = fit_common(spec, self.bias, stickiness, stay=1 - 1 / RUN)
        self.gain = expert_gain(spec, self.bias)
        writers = 3 if spec.moe is not None and spec.moe.shared_width else 2  # attention, experts, shared experts
        self.written = 4 / writers / len(spec.layers)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model, layer by layer, expert by expert: bfloat16, correction biases float32."""
        spec = self.spec
        family = family_of(spec.model_type, "synthetic")
        resident = family.resident_tensors(spec)
        blocks = _normal((math.ceil(spec.vocab / CHOICES), spec.hidden), 1.0)
        yield family.embedding_name(), self._embedding(blocks)
        for layer in range(len(spec.layers)):
            for role, (name, shape) in family.trunk_tensors(spec, TrunkKey(layer)).items():
                yield name, self._matrix(role, shape)
            for expert in range(spec.experts) if layer in spec.moe_layers else ():
                for role, (name, shape) in family.expert_tensors(spec, ExpertKey(layer, expert)).items():
                    yield name, self._of_expert(role, shape, layer, expert)
            yield resident[f"{layer}.norm"][0], torch.ones(spec.hidden, dtype=torch.bfloat16)
            if layer in spec.moe_layers:
                router, bias = self._router(layer)
                yield resident[f"{layer}.router"][0], router
                if f"{layer}.correction" in resident:
                    yield resident[f"{layer}.correction"][0], bias
                if f"{layer}.router_bias" in resident:
                    yield resident[f"{layer}.router_bias"][0], torch.zeros(spec.experts, dtype=torch.bfloat16)
        yield resident["norm"][0], torch.ones(spec.hidden, dtype=torch.bfloat16)
        yield family.head_name(spec), self._head(blocks)

    def _of_expert(self, role: str, shape: tuple[int, ...], layer: int, expert: int) -> Tensor:
        if not self.variety:
            return self._matrix(role, shape, self.gain)
        # Different strides, so that experts with one matrix in common differ in another.
        stride = {"gate_proj": 1, "up_proj": 3}.get(role, 5)
        key = role, (stride * (expert // self.variety + layer) + expert) % self.variety
        if key not in self.drawn:
            self.drawn[key] = self._matrix(role, shape, self.gain)
        return self.drawn[key]

    def _matrix(self, role: str, shape: tuple[int, ...], gain: float = 1.0) -> Tensor:
        """``gain``: of what the matrix writes to the residual stream."""
        if len(shape) == 1:
            return torch.full(shape, 1.0 if role.endswith("norm") else 0.0, dtype=torch.bfloat16)  # 0: biases and sinks
        if role not in ("o_proj", "down_proj"):
            return _normal(shape, shape[1] ** -0.5)
        writer = _normal(shape, gain * (self.written / shape[1]) ** 0.5)
        writer[:TOPICS] = 0
        return writer

    def _spread(self, layer: int) -> float:
        """The root mean square of the residual stream that enters ``layer``; its norm divides by it."""
        return math.sqrt(1 + LEVEL**2 / self.spec.hidden + GROWTH * layer / len(self.spec.layers))

    def _embedding(self, blocks: Tensor) -> Tensor:
        """Block by block, since the table may be two gigabytes; so does the head."""
        spec = self.spec
        table = _normal((spec.vocab, spec.hidden), (1 - SHARED) ** 0.5)
        for part, block in zip(table.split(CHOICES), blocks, strict=True):
            part += SHARED**0.5 * block
        topic = torch.arange(spec.vocab) // CHOICES // RUN % TOPICS
        table[:, :TOPICS] = LEVEL * functional.one_hot(topic, TOPICS)
        return table

    def _head(self, blocks: Tensor) -> Tensor:
        """Logits of variance one, except those of the next block."""
        spec = self.spec
        head = _normal((spec.vocab, spec.hidden), spec.hidden**-0.5)
        for part, before in zip(head.split(CHOICES), blocks.roll(1, 0), strict=True):
            part += NEXT / spec.hidden * before
        head[:, :TOPICS] = 0
        return head

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
