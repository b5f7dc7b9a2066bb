"""From a record's bytes to weights that can be multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tierlm.kernels import Weight, gated_mlps
from tierlm.weights.checkpoint import Place, Record

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
SCALE = ".scale"  # a role's block scales lie under the role's name with this ending

Weights = Mapping[str, Weight]


def view(buffer: Tensor, place: Place) -> Tensor:
    """The tensor at ``place`` inside a record's bytes (uint8 [n]); a view, unless the file misaligns it."""
    data = buffer[place.offset : place.offset + place.nbytes]
    dtype = DTYPES[place.dtype]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(place.shape)


def weights_of(buffer: Tensor, record: Record) -> Weights:
    """All weights of a record by role, as views into its bytes."""
    tensors = {role: view(buffer, place) for role, place in record.places.items()}
    scaled = {role.removesuffix(SCALE): tensor for role, tensor in tensors.items() if role.endswith(SCALE)}
    return {r: Weight(t, scaled.get(r)) for r, t in tensors.items() if not r.endswith(SCALE)}


def expert_ffns(jobs: Sequence[tuple[Tensor, Tensor, Weights]]) -> None:
    """Several routed experts: (x, y, weights), float32 [T, hidden] both; y, contiguous, is written."""
    gated_mlps([(x, y, (expert["gate_proj"], expert["up_proj"], expert["down_proj"])) for x, y, expert in jobs])
