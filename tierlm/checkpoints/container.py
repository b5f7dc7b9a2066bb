"""A model's files, whatever their container: the config, and the places of tensors. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tierlm.checkpoints.checkpoint import Checkpoint, Header, read_json
from tierlm.checkpoints.gguf import GgufCheckpoint
from tierlm.checkpoints.multimodal import text_config
from tierlm.checkpoints.record import TensorInfo
from tierlm.files import Stamp


class Container(Protocol):
    """The places of a model's tensors.

    ``path``: the folder or the first file. ``tensors``: by their names in the files. ``headers``: of safetensors files.
    ``stamps``: of all files, when their headers were read.
    ``count``: of tensors, with stacked experts one by one. ``digest``: identifies the config.
    """

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def stamps(self) -> Mapping[Path, Stamp]: ...

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
    """A language model's config, in the words of ``config.json``, and ``where`` it is. ``open`` finds its tensors."""

    config: Mapping[str, Any]
    where: str
    open: Callable[[], Container]


def files_of(container: Container) -> list[Path]:
    """The files that contain the tensors."""
    return sorted({tensor.file for tensor in container.tensors.values()})


def fingerprint_of(container: Container) -> str:
    """Identifies a model: a hash of its config and of its files' names and sizes."""
    digest = hashlib.sha256(container.digest)
    for file in files_of(container):
        digest.update(f"{file.name} {container.stamps[file].size}".encode())
    return digest.hexdigest()[:32]


def describe(path: Path) -> Described:
    """Describe a folder in Hugging Face layout, or a GGUF file. Raises CheckpointError, UnsupportedModelError."""
    if path.is_file():
        found = GgufCheckpoint(path)
        return Described(found.config, str(path), lambda: found)
    where = path / "config.json"
    config = read_config(where)
    return Described(config, str(where), lambda: Checkpoint(path, _endings(config)))


def _endings(config: Mapping[str, Any]) -> Mapping[str, str]:
    """GPTQ stores zero points in two ways, under one name."""
    stated = config.get("quantization_config")
    second = isinstance(stated, Mapping) and stated.get("checkpoint_format") == "gptq_v2"
    return {".qzeros": ".qzeros_v2"} if second else {}


def read_config(file: Path) -> Mapping[str, Any]:
    """The language model's config in a ``config.json``. Raises CheckpointError."""
    return text_config(read_json(file))
