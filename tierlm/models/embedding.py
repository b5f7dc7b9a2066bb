"""Token embeddings, read from the checkpoint row by row; the table is never loaded as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.checkpoints.checkpoint import TensorInfo
from tierlm.checkpoints.rows import Rows
from tierlm.checkpoints.views import DTYPES


class Embedding:
    """``rows`` of the table at ``place``, read on demand."""

    def __init__(self, rows: Rows, place: TensorInfo, device: torch.device):
        self._rows, self._dtype, self._device = rows, DTYPES[place.dtype], device

    def read(self, ids: Sequence[int]) -> Tensor:
        """float32 [T, hidden]. Raises StorageError."""
        rows = torch.frombuffer(bytearray(self._rows.read(ids)), dtype=self._dtype)
        return rows.view(len(ids), -1).to(self._device, torch.float32)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._rows.close()
