"""A trace: the experts of every token of a run, layer by layer, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tierlm.errors import TraceError, shown

MAX_LAYERS = 4096  # about forty times the deepest model: more is a corrupt file
MAX_EXPERTS = 4096  # of a layer, about ten times as many as any model has: a larger id is an error
BLOCK = 4096  # tokens processed at a time
MARKS = 2**22  # steps x records processed at a time

# Arrays of a Trace, by token, and their dimensions.
PARTS = {"experts": 3, "sequences": 1, "steps": 1, "prefill": 1, "scores": 3, "predictions": 4}

Ids = npt.NDArray[np.int16]


class Step(NamedTuple):
    """One pass through the layers. ``needed``: by MoE layer the distinct experts of its tokens, ascending."""

    prefill: bool
    tokens: int
    needed: list[list[int]]


@dataclass(frozen=True, eq=False)
class Demands:
    """The demands of S steps of L MoE layers. ``ids``: int32 [n], records as MoE layer x experts + expert: for each
    layer of each step the distinct ones, ascending. ``ends``: int64 [S, L], where those of a layer end. ``prefill``:
    bool [S]. ``tokens``: int64 [S]."""

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    prefill: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """[S, L] records of each layer of each step."""
        return np.diff(self.ends.ravel(), prepend=0).reshape(self.ends.shape)


@dataclass(frozen=True)
class TraceInfo:
    """The model of a trace. ``experts``: of a layer; the largest id plus one if the file gives no number.

    ``layers``: number of all layers; ``moe_layers``: numbers of those with routed experts. ``record_bytes``: bytes of
    one expert in its file; 0: unknown. ``order``: by MoE layer all experts in disk order, the order in which a prefill
    reads; empty: by number.
    """

    model: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    record_bytes: int = 0
    order: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Trace:
    """``experts``: int16 [N, L, k] of N tokens and L MoE layers, in the router's order, padded with -1.

    ``sequences`` and ``steps``: int32 [N], the sequence and the step of each token; tokens of one step ran together and
    are adjacent. ``prefill``: bool [N]. Recorded on request, else None: ``scores``: float16 [N, L, E], the router's
    scores of all experts; ``predictions``: int16 [N, L, A, m], the router's ranking from the hidden state 0, 1, ...
    A - 1 layers earlier, the likeliest first, -1 if it was not asked.
    """

    info: TraceInfo
    experts: Ids
    sequences: npt.NDArray[np.int32]
    steps: npt.NDArray[np.int32]
    prefill: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float16] | None = None
    predictions: Ids | None = None

    def __post_init__(self) -> None:
        """Raises TraceError if the parts disagree."""
        tokens, layers, chosen = self.experts.shape
        info = self.info
        if not self.experts.size:
            raise TraceError("the trace is empty: no token has an expert")
        numbers = info.moe_layers
        if len(numbers) != layers or any(a >= b for a, b in pairwise((-1, *numbers, info.layers))):
            raise TraceError(f"expected {layers} MoE layers within {info.layers} layers, found {shown(numbers)}")
        if not 1 <= info.experts <= MAX_EXPERTS or chosen > info.experts:
            raise TraceError(f"expected 1 to {MAX_EXPERTS} experts of a layer, found {info.experts}, {chosen} chosen")
        if info.layers > MAX_LAYERS or not 0 <= info.record_bytes < 2**32:
            raise TraceError(
                f"expected at most {MAX_LAYERS} layers and records of less than 4 GiB, found {info.layers} and "
                f"{info.record_bytes} bytes"
            )
        if info.order and (
            len(info.order) != layers or any(sorted(row) != list(range(info.experts)) for row in info.order)
        ):
            raise TraceError(f"order: expected each of {info.experts} experts once in each of {layers} layers")
        for name, dimensions in PARTS.items():
            part = getattr(self, name)
            if part is not None and (part.ndim != dimensions or len(part) != tokens):
                raise TraceError(f"{name}: expected one entry for each of {tokens} tokens, found {list(part.shape)}")
        for start in range(0, tokens, BLOCK):
            check_ids(self.experts[start : start + BLOCK], info.experts, start)
        if (np.diff(self.steps) < 0).any():
            at = int(np.argmax(np.diff(self.steps) < 0)) + 1
            raise TraceError(f"token {at}: expected steps in order, found {self.steps[at]} after {self.steps[at - 1]}")

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.experts)

    @property
    def moe_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def records(self) -> int:
        """Experts of the model: MoE layers x experts."""
        return self.moe_layers * self.info.experts

    def part(self, start: int, stop: int) -> Trace:
        """The tokens ``start`` to ``stop`` - 1; a cut step becomes a smaller one."""
        parts: dict[str, Any] = {name: part for name, part in vars(self).items() if name in PARTS}
        return replace(self, **{name: part[start:stop] for name, part in parts.items() if part is not None})

    def passes(self) -> Iterator[Step]:
        """The steps in order, converted to lists in blocks, to bound memory."""
        layers, bounds = self.moe_layers, self.bounds()
        for ids, counts in self._blocks():
            experts, ends = (ids % self.info.experts).tolist(), [0, *np.cumsum(counts).tolist()]
            for first in range(0, len(counts), layers):
                start, stop = next(bounds)
                needed = [experts[a:b] for a, b in pairwise(ends[first : first + layers + 1])]
                yield Step(bool(self.prefill[start]), stop - start, needed)

    def bounds(self) -> Iterator[tuple[int, int]]:
        """The first token of each step, and the one after its last."""
        return pairwise(self._edges.tolist())

    @cached_property
    def demands(self) -> Demands:
        """The demands of all steps; about 4 bytes each."""
        ids, counts = zip(*self._blocks(), strict=True)
        ends = np.cumsum(np.concatenate(counts), dtype=np.int64)
        prefill, tokens = self.prefill[self._edges[:-1]], np.diff(self._edges)
        return Demands(np.concatenate(ids), ends.reshape(-1, self.moe_layers), prefill, tokens)

    @cached_property
    def _edges(self) -> npt.NDArray[np.intp]:
        """[S + 1] the first token of each step, and the end."""
        return np.concatenate([[0], np.flatnonzero(np.diff(self.steps)) + 1, [len(self)]])

    def _blocks(self) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]]:
        """In blocks of steps: ``ids`` of Demands, and the number of records of each layer of each step."""
        edges, layers, experts = self._edges, self.moe_layers, self.info.experts
        first = 0
        while first < len(edges) - 1:
            most = int(np.searchsorted(edges, edges[first] + BLOCK, "right")) - 1
            last = max(first + 1, min(most, first + MARKS // self.records))
            rows = self.experts[edges[first] : edges[last]]
            step = np.repeat(np.arange(last - first), np.diff(edges[first : last + 1]))
            marks = np.zeros((last - first) * self.records, bool)
            places = (step[:, None, None] * layers + np.arange(layers)[:, None]) * experts + rows
            marks[places[rows >= 0]] = True
            found = np.flatnonzero(marks)
            yield (
                (found % self.records).astype(np.int32),
                np.bincount(found // experts, minlength=(last - first) * layers),
            )
            first = last


def check_ids(ids: Ids, experts: int, first: int, where: str = "token") -> None:
    """Raises TraceError for an id that is no expert, or occurs twice for a token. ``ids``: [T, L, k], -1: none; the
    error calls the first row ``where`` ``first``."""
    wrong = (ids < -1) | (ids >= experts)
    if wrong.any():
        token, layer, choice = (int(i) for i in np.argwhere(wrong)[0])
        raise TraceError(
            f"{where} {first + token}, MoE layer {layer}: expected experts 0 to {experts - 1}, "
            f"found {ids[token, layer, choice]}"
        )
    ordered = np.sort(ids, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
    if twice.any():
        token, layer, choice = (int(i) for i in np.argwhere(twice)[0])
        raise TraceError(
            f"{where} {first + token}, MoE layer {layer}: expert {ordered[token, layer, choice]} occurs twice"
        )
