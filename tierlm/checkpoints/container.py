"""A model's files, whatever their container: the config, and the places of tensors. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tierlm.checkpoints.checkpoint import Checkpoint, Header, TensorInfo, read_json
from tierlm.checkpoints.gguf import GgufCheckpoint, open_gguf


class Container(Protocol):
    """The places of a model's tensors. ``path``: the folder or the first file; ``tensors``: by their names in the files;
    ``headers``: of safetensors files; ``digest``: identifies the config; ``count``: of tensors, stacked experts one by one."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def headers(self) -> Mapping[Path, Header]: ...

    @property
    def count(self) -> int: ...

    @property
    def digest(self) -> bytes: ...

    def find(self, name: str) -> TensorInfo | None:
        """The tensor that Hugging Face calls ``name``."""

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        """``find``. Raises CheckpointError if the tensor is missing or its shape is not ``shape``."""


@dataclass(frozen=True)
class Described:
    """A model's config, in the words of ``config.json``, and ``where`` it is. ``open`` reads the places of its tensors."""

    config: Mapping[str, Any]
    where: str
    open: Callable[[], Container]


def describe(path: Path) -> Described:
    """Describe a folder in Hugging Face layout, or a GGUF file. Raises CheckpointError, UnsupportedModelError."""
    if path.is_file():
        config, header = open_gguf(path)
        return Described(config, str(path), lambda: GgufCheckpoint(path, header))
    where = path / "config.json"
    return Described(read_json(where), str(where), lambda: Checkpoint(path))
