"""A trace: which experts every token of a run chose, layer by layer. What is to be decided is in it, no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tierlm.errors import TraceError

MAX_EXPERTS = 4096  # of a layer, about ten times what any model has: a larger id is taken for a broken one
BLOCK = 4096  # tokens that are looked at at a time
MARKS = 2**22  # steps x records, likewise

Ids = npt.NDArray[np.int16]


class Step(NamedTuple):
    """One pass through the layers. ``needed``: by MoE layer the experts that its tokens chose, each once, ascending."""

    prefill: bool
    tokens: int
    needed: list[list[int]]


@dataclass(frozen=True, eq=False)
class Demands:
    """What S steps of L MoE layers need. ``ids``: int32 [n], records as MoE layer x experts + expert, layer by layer of
    each step, each once there, ascending; ``ends``: int64 [S, L], where those of a layer end; of a step, ``prefill``:
    bool [S], and ``tokens``: int64 [S]."""

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    prefill: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]

    @property
    def layers(self) -> int:
        return int(self.ends.shape[1])

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """[S, L] records that a layer of a step needs."""
        return np.diff(self.ends.ravel(), prepend=0).reshape(self.ends.shape)


@dataclass(frozen=True)
class TraceInfo:
    """Of which model a trace is. ``experts``: of a layer; where a file does not say, one more than the largest id.

    ``layers`` counts all layers of the model, ``moe_layers`` numbers those with routed experts. ``record_bytes`` is
    what one expert takes in its file, 0: not known. ``order``: by MoE layer all experts as they lie on the disk, which
    is how a prefill reads them; empty: by number.
    """

    model: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    record_bytes: int = 0
    order: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Trace:
    """``experts``: int16 [N, L, k], of N tokens and L MoE layers, in the router's order, -1 where there are fewer.

    ``sequences`` and ``steps``: int32 [N], to which sequence a token belongs and in which step it ran; tokens of one
    step ran together and stand side by side. ``prefill``: bool [N]. On request when recording, else None:
    ``scores``: float16 [N, L, E], what each layer's router gave all experts;
    ``predictions``: int16 [N, L, A, m], whom its gate would have chosen from the hidden state 0, 1, ... A - 1 layers
    earlier, the likeliest first, -1 where it was not asked.
    """

    info: TraceInfo
    experts: Ids
    sequences: npt.NDArray[np.int32]
    steps: npt.NDArray[np.int32]
    prefill: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float16] | None = None
    predictions: Ids | None = None

    def __post_init__(self) -> None:
        """Raises TraceError where the parts contradict each other."""
        tokens, layers, _ = self.experts.shape
        info = self.info
        if not self.experts.size or not tokens:
            raise TraceError("the trace is empty: it has no token that chose an expert")
        numbers = info.moe_layers
        if len(numbers) != layers or any(a >= b for a, b in pairwise((-1, *numbers, info.layers))):
            raise TraceError(f"expected {layers} MoE layers within {info.layers} layers, found {list(numbers)}")
        if not 1 <= info.experts <= MAX_EXPERTS:
            raise TraceError(f"expected 1 to {MAX_EXPERTS} experts of a layer, found {info.experts}")
        if info.order and (
            len(info.order) != layers or any(sorted(row) != list(range(info.experts)) for row in info.order)
        ):
            raise TraceError(f"order: expected each of {info.experts} experts once for each of {layers} layers")
        for name in ("sequences", "steps", "prefill", "scores", "predictions"):
            part = getattr(self, name)
            if part is not None and len(part) != tokens:
                raise TraceError(f"{name}: expected one entry for each of {tokens} tokens, found {len(part)}")
        for start in range(0, tokens, BLOCK):
            check_ids(self.experts[start : start + BLOCK], info.experts, start)
        if (np.diff(self.steps) < 0).any():
            at = int(np.argmax(np.diff(self.steps) < 0)) + 1
            raise TraceError(f"token {at}: expected steps in order, found {self.steps[at]} behind {self.steps[at - 1]}")

    def __len__(self) -> int:
        """Tokens."""
        return len(self.experts)

    @property
    def moe_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def records(self) -> int:
        """All experts of the model: layers times experts."""
        return self.moe_layers * self.info.experts

    def part(self, start: int, stop: int) -> Trace:
        """The tokens from ``start`` to before ``stop``; a step that is cut counts as a smaller one."""
        names = ("experts", "sequences", "steps", "prefill", "scores", "predictions")
        parts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part[start:stop] for name, part in parts.items() if part is not None})

    def passes(self) -> Iterator[Step]:
        """Its steps in order. Some at a time become lists, so that memory stays bounded."""
        layers, bounds = self.moe_layers, self.bounds()
        for ids, counts in self._blocks():
            experts, ends = (ids % self.info.experts).tolist(), [0, *np.cumsum(counts).tolist()]
            for first in range(0, len(counts), layers):
                start, stop = next(bounds)
                needed = [experts[a:b] for a, b in pairwise(ends[first : first + layers + 1])]
                yield Step(bool(self.prefill[start]), stop - start, needed)

    def bounds(self) -> Iterator[tuple[int, int]]:
        """The first token of each step, and the one behind its last."""
        return pairwise(self._edges.tolist())

    @cached_property
    def demands(self) -> Demands:
        """All that its steps need, at once: some 4 bytes a demand."""
        ids, counts = zip(*self._blocks(), strict=True)
        ends = np.cumsum(np.concatenate(counts), dtype=np.int64)
        prefill, tokens = self.prefill[self._edges[:-1]], np.diff(self._edges)
        return Demands(np.concatenate(ids), ends.reshape(-1, self.moe_layers), prefill, tokens)

    @cached_property
    def _edges(self) -> npt.NDArray[np.intp]:
        """[S + 1] the first token of each step, and the end."""
        return np.concatenate([[0], np.flatnonzero(np.diff(self.steps)) + 1, [len(self)]])

    def _blocks(self) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]]:
        """Of some steps at a time: the records that each layer of each step needs, as in Demands; and how many."""
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
    """Refuse what no router chooses: an id that is not an expert, or one twice. ``ids``: [T, L, k], -1 for none;
    the first row is called ``where`` ``first`` in the TraceError."""
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
            f"{where} {first + token}, MoE layer {layer}: expert {ordered[token, layer, choice]} stands there twice"
        )
