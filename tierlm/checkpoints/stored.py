"""A weight in a checkpoint's files. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from tierlm.checkpoints.checkpoint import check_shape
from tierlm.checkpoints.record import TensorInfo
from tierlm.errors import UnsupportedModelError
from tierlm.formats import FORMATS, Part, Shape, recognise
from tierlm.formats.format import part_name

SCALE, EXTRA = ".scale", ".extra"  # suffixes of the roles that hold the other parts of a role's weight


class Tensors(Protocol):
    """Where tensors are found by name: a Container, or one expert's part of its stacks."""

    def find(self, name: str) -> TensorInfo | None: ...

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo: ...


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of ``shape`` in a format. ``parts``: suffix of the tensor's name -> tensor."""

    name: str
    shape: Shape
    format: str
    parts: Mapping[str, TensorInfo]

    def by_name(self) -> dict[str, TensorInfo]:
        """The parts by their names, which may differ from those in the file."""
        return {part_name(self.name, suffix): part for suffix, part in self.parts.items()}


def float_dtypes() -> list[str]:
    """The dtypes of weights without scales."""
    return [format.dtype for format in FORMATS.values() if format.loadable and not format.matrices_only]


def find_weight(checkpoint: Tensors, name: str, shape: Shape) -> StoredWeight:
    """The weight ``name`` in any supported format. Raises CheckpointError, UnsupportedModelError."""

    def find(ending: str) -> Part | None:
        part = checkpoint.find(part_name(name, ending))
        return None if part is None else (part.dtype, part.shape)

    format = recognise(shape, find)
    if format is None:
        tensor = checkpoint.tensor(name)
        others = dict.fromkeys(each.dtype for each in FORMATS.values() if each.loadable and each.matrices_only)
        raise UnsupportedModelError(
            f"{tensor.file}: {name} is {tensor.dtype}; supported are {', '.join(float_dtypes())}, and for matrices "
            f"{', '.join(others)} with their scales"
        )
    parts = {}
    for ending, expected in format.parts(shape).items():
        part = parts[ending] = checkpoint.tensor(part_name(name, ending))
        if not format.fits(ending, expected, (part.dtype, part.shape)):
            check_shape(part, expected[1])
            raise UnsupportedModelError(f"{part.file}: {part.name} is {part.dtype}; {expected[0]} is supported")
    return StoredWeight(name, shape, format.name, parts)


def by_role(weights: Mapping[str, StoredWeight]) -> dict[str, TensorInfo]:
    """The tensors of ``weights`` by role, with format and size; scales and extra, if any, as ``role.scale`` and
    ``role.extra``."""
    found: dict[str, TensorInfo] = {}
    for role, weight in weights.items():
        data, scale, extra = FORMATS[weight.format].divide(list(weight.parts.values()))
        found[role] = replace(data, format=weight.format, size=weight.shape)
        found |= {role + ending: part for ending, part in ((SCALE, scale), (EXTRA, extra)) if part is not None}
    return found
