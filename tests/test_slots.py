"""A slot's weights are those of its present record."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import torch

from tierlm.checkpoints.record import Extent, Place, Record
from tierlm.memory.slots import Slot


def record(*offsets: int) -> Record:
    return Record(64, (Extent(Path("file"), 0, 64, 0, ()),), places_at(*offsets))


@cache
def places_at(*offsets: int) -> dict[str, Place]:
    """The same mapping for the same layout, as in a catalog."""
    return {f"matrix{i}": Place(offset, 24, "F32", (2, 3), "f32") for i, offset in enumerate(offsets)}


def test_weights_are_of_what_is_there_however_the_file_aligns_it() -> None:
    layouts = [record(0, 24), record(0, 24), record(8, 32), record(1, 26), record(1, 26)]
    slot = Slot(torch.zeros(64, dtype=torch.uint8))
    for fill, (before, layout) in enumerate(itertools.product(layouts, layouts)):
        slot.weights(before, False)
        slot.buffer.random_(0, 100)
        content = bytes(slot.buffer.tolist())
        found = slot.weights(layout, False)
        for role, place in layout.places.items():
            expected = content[place.offset : place.offset + place.nbytes]
            if layout is not before or place.offset % 4 == 0:  # a record never changes its bytes
                assert found[role].data.numpy().tobytes() == expected, fill


def test_records_laid_out_alike_share_their_views() -> None:
    slot = Slot(torch.zeros(64, dtype=torch.uint8))
    assert slot.weights(record(0, 24), False) is slot.weights(record(0, 24), False)
