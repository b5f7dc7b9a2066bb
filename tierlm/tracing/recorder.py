"""Records the experts that a running model uses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tierlm.errors import StorageError
from tierlm.tracing.trace import TraceInfo
from tierlm.tracing.tracefile import TraceWriter

AHEAD = 3  # router predictions are recorded 0, 1 and 2 layers ahead
RANKED = 4  # length of a prediction, in experts per token

Array = npt.NDArray[Any]


class Recorder:
    """Records one run. The decoder reports the begin and end of each step, the MoE layers their expert ids.

    ``chosen``: experts per token. ``scores``: also write the routers' scores and predictions, which evaluates each
    router AHEAD more times. A failed step is not recorded. Raises OSError; ``end`` raises StorageError.
    """

    def __init__(self, file: Path, info: TraceInfo, chosen: int, scores: bool):
        self.info, self.scores = info, scores
        self.ranked = min(info.experts, RANKED * chosen)
        self._shape = (len(info.moe_layers), chosen)
        self._place = {layer: at for at, layer in enumerate(info.moe_layers)}
        self._writer = TraceWriter(file, info)
        self._sequences: dict[Hashable, int] = {}  # by its KV span: the sequence's number
        self._count = self._step = 0
        self._rows: dict[str, Array] = {}

    def begin(self, sequences: Sequence[tuple[Hashable, int, int]], prefill: bool) -> None:
        """Begin a step. ``sequences``: (its KV span, tokens already cached, new tokens) of each. One that begins with
        copied tokens is a new one."""
        numbers: list[int] = []
        for span, cached, new in sequences:
            if not cached or span not in self._sequences:
                self._sequences[span] = self._count
                self._count += 1
            numbers += [self._sequences[span]] * new
        tokens, (layers, chosen) = len(numbers), self._shape
        self._rows = {"experts": np.full((tokens, layers, chosen), -1, np.int16)}
        self._rows |= {"sequences": np.array(numbers, np.int32), "steps": np.full(tokens, self._step, np.int32)}
        self._rows["prefill"] = np.full(tokens, prefill)
        if self.scores:
            self._rows["scores"] = np.zeros((tokens, layers, self.info.experts), np.float16)
            self._rows["predictions"] = np.full((tokens, layers, AHEAD, self.ranked), -1, np.int16)

    def choose(self, layer: int, experts: Array, scores: Array | None = None) -> None:
        """``layer`` has chosen ``experts`` [T, k], in the router's order; ``scores``: [T, E], if recorded."""
        at = self._place[layer]
        self._rows["experts"][:, at] = experts
        if scores is not None:
            self._rows["scores"][:, at] = scores

    def predict(self, layer: int, ahead: int, ranked: Array) -> None:
        """The router of ``layer`` ranks ``ranked`` [T, ranked] first, ``ahead`` layers before it runs."""
        self._rows["predictions"][:, self._place[layer], ahead] = ranked

    def end(self) -> None:
        """End the step. Raises StorageError if the trace cannot be written, in this step or before."""
        try:
            self._writer.add(**self._rows)
        except OSError as error:
            file = str(self._writer.file)
            raise StorageError(f"trace: {file}: cannot be written: {error.strerror}", file=file) from error
        self._rows = {}
        self._step += 1

    def close(self) -> None:
        """Write the trace to the disk, unless a step could not be written."""
        self._writer.close()

    def drop(self) -> None:
        """Discard the trace."""
        self._writer.drop()
