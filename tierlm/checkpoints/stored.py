"""A weight in a checkpoint's files. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tierlm.checkpoints.checkpoint import TensorInfo
from tierlm.checkpoints.container import Container
from tierlm.errors import UnsupportedModelError
from tierlm.formats import FORMATS, Part, Shape, recognise

SCALE = ".scale"  # suffix of the role that holds the scales of a role's weight


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of ``shape`` in a format. ``parts``: suffix of the tensor's name -> tensor."""

    name: str
    shape: Shape
    format: str
    parts: Mapping[str, TensorInfo]


def float_dtypes() -> list[str]:
    """The dtypes of weights without scales."""
    return [format.dtype for format in FORMATS.values() if format.loadable and not format.matrices_only]


def find_weight(checkpoint: Container, name: str, shape: Shape) -> StoredWeight:
    """The weight ``name`` in any supported format. Raises CheckpointError, UnsupportedModelError."""
    tensor = checkpoint.tensor(name)

    def find(ending: str) -> Part | None:
        part = checkpoint.find(name + ending)
        return None if part is None else (part.dtype, part.shape)

    format = recognise(shape, find)
    if format is None:
        others = [each.dtype for each in FORMATS.values() if each.loadable and each.matrices_only]
        raise UnsupportedModelError(
            f"{tensor.file}: {name} is {tensor.dtype}; supported are {', '.join(float_dtypes())}, and for matrices "
            f"{', '.join(others)} with their scales"
        )
    parts = {}
    for ending, (dtype, expected) in format.parts(shape).items():
        part = parts[ending] = checkpoint.tensor(name + ending, expected)
        if part.dtype != dtype:
            raise UnsupportedModelError(f"{part.file}: {part.name} is {part.dtype}; {dtype} is supported")
    return StoredWeight(name, shape, format.name, parts)


def by_role(weights: Mapping[str, StoredWeight]) -> dict[str, TensorInfo]:
    """The tensors of ``weights`` by role, with format and size; scales, if any, as ``role.scale``."""
    return {
        (role + SCALE if ending else role): part if ending else replace(part, format=weight.format, size=weight.shape)
        for role, weight in weights.items()
        for ending, part in weight.parts.items()
    }
