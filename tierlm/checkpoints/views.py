"""The weights in a record's bytes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tierlm.checkpoints.record import Place, Record
from tierlm.checkpoints.stored import EXTRA, SCALE
from tierlm.formats.dtypes import torch_dtypes
from tierlm.kernels import Weight

DTYPES = torch_dtypes()

Weights = Mapping[str, Weight]


def view(buffer: Tensor, place: Place) -> Tensor:
    """The tensor at ``place`` of a record's bytes (uint8 [n]): a view, or a copy if the file misaligns it."""
    data = buffer[place.offset : place.offset + place.nbytes]
    dtype = DTYPES[place.dtype]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(place.shape)


def misaligned(buffer: Tensor, record: Record) -> bool:
    """Whether ``view`` would copy a tensor of ``record`` in ``buffer``."""
    start = buffer.storage_offset()
    return any((start + place.offset) % DTYPES[place.dtype].itemsize for place in record.places.values())


def weights_of(buffer: Tensor, record: Record, exact: bool = False) -> Weights:
    """The weights of a record by role, as views into its bytes. ``exact``: see Weight."""

    def part(role: str) -> Tensor | None:
        place = record.places.get(role)
        return None if place is None else view(buffer, place)

    return {
        role: Weight(view(buffer, place), place.format, part(role + SCALE), place.size, exact, part(role + EXTRA))
        for role, place in record.places.items()
        if place.format
    }
