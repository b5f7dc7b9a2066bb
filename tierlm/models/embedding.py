"""Token embeddings, read from the checkpoint row by row; the table is never loaded as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.checkpoints.record import TensorInfo
from tierlm.checkpoints.rows import Rows
from tierlm.checkpoints.views import DTYPES
from tierlm.kernels import Weight, widen


class Embedding:
    """``rows`` of the table at ``place``, whose format stores rows one by one, read on demand."""

    def __init__(self, rows: Rows, place: TensorInfo, device: torch.device):
        self._rows, self._place, self._device = rows, place, device

    def read(self, ids: Sequence[int]) -> Tensor:
        """float32 [T, hidden]. Raises StorageError."""
        place = self._place
        data = torch.frombuffer(bytearray(self._rows.read(ids)), dtype=DTYPES[place.dtype]).view(len(ids), -1)
        return widen(Weight(data, place.format, None, (len(ids), place.size[1]))).to(self._device)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._rows.close()
