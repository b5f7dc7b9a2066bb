"""A GGUF checkpoint read in place: one file or a split one, found by Hugging Face's tensor names. No torch."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tierlm.checkpoints.checkpoint import EXPERT, Header, check_shape
from tierlm.checkpoints.gguf_config import config_of
from tierlm.checkpoints.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from tierlm.checkpoints.record import TensorInfo
from tierlm.errors import CheckpointError
from tierlm.files import open_regular

FLOATS = ("F32", "F16", "BF16")
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MAX_SPLITS = 1000
SUFFIXED = {  # vectors that GGUF names after a matrix
    "e_score_correction_bias": "e_score_correction.bias",
    "dt_bias": "dt_proj.bias",
    ".router.scale": ".router.proj.scale",
    ".router.per_expert_scale": ".experts.down_proj.scale",
}
MAX_DIVISORS = 2**14  # bytes of rope_freqs


class GgufCheckpoint:
    """See Container. A quantised tensor has GGML's type as its dtype, and the bytes of a row as its last dimension.

    ``file``: the only file, or the first one of a split checkpoint, which has the metadata. Raises CheckpointError and
    UnsupportedModelError.
    """

    headers: Mapping[Path, Header] = {}

    def __init__(self, file: Path):
        header = read_gguf_header(file)
        self.path, self.digest, parts = file, b"", _parts(file, header)
        found = {name: tensor for _, own in parts for name, tensor in own.tensors.items()}
        try:
            self.config = config_of(header.metadata, found, str(file))
        except (TypeError, ValueError, IndexError, OverflowError) as error:  # values of other types than it expects
            raise CheckpointError(f"{file}: malformed metadata: {error}") from error
        if (divisors := found.get("rope_freqs.weight")) is not None:
            self.config["rope_divisors"] = _floats(file, divisors)
        self._names = _name_map(header)
        self.tensors: dict[str, TensorInfo] = {}
        self._stacks: dict[str, int] = {}  # tensors of more than two dimensions -> the first one
        self.stamps = {part: own.stamp for part, own in parts}
        for part, own in parts:
            self.digest = hashlib.sha256(self.digest + own.digest).digest()
            for name, tensor in own.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{part}: tensor {name} is also in {self.tensors[name].file.name}")
                shape = tensor.shape
                if len(shape) > 2:
                    self._stacks[name] = shape[0]
                    shape = -1 if 0 in shape else tensor.nbytes // tensor.row_bytes, shape[-1]
                if tensor.kind not in FLOATS:
                    shape = *shape[:-1], tensor.row_bytes
                self.tensors[name] = TensorInfo(name, part, tensor.offset, tensor.nbytes, tensor.kind, shape)

    @property
    def count(self) -> int:
        return len(self.tensors) - len(self._stacks) + sum(self._stacks.values())

    def find(self, name: str) -> TensorInfo | None:
        expert = EXPERT.fullmatch(name)
        if expert is None:
            found = self.tensors.get(self._translated(name))
            if found is not None and name.endswith("shared_expert_gate.weight"):  # a vector in GGUF
                return replace(found, shape=(1, *found.shape))
            if found is not None and name.endswith("conv1d.weight") and len(found.shape) == 2:
                return replace(found, shape=(found.shape[0], 1, found.shape[1]))
            return found
        stack = self._translated(f"{expert[1]}.{expert[3]}")
        found, number = self.tensors.get(stack), int(expert[2])
        if found is None or len(found.shape) < 2:
            return None
        count = self._stacks.get(stack, found.shape[0])  # of vectors, if it has two dimensions
        if number >= count:
            return None
        rows = found.shape[0] // count
        part = found.rows(number * rows, (number + 1) * rows)
        return part if stack in self._stacks else replace(part, shape=part.shape[1:])

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"{self.path}: tensor {self._translated(name)} is missing (Hugging Face: {name})")
        return check_shape(found, shape)

    def _translated(self, name: str) -> str:
        """GGUF's name of a tensor; of the stack, for an expert's tensor without its number."""
        for theirs, plain in SUFFIXED.items():
            name = name.replace(theirs, plain)
        stem, _, ending = name.rpartition(".")
        if (known := self._names.get_name(stem)) is not None:
            return f"{known}.{ending}"
        known = self._names.get_name(name) or name
        return known if ending == "A_log" else f"{known}.weight"


def _parts(file: Path, header: GgufHeader) -> list[tuple[Path, GgufHeader]]:
    """All files of a split checkpoint, from its first."""
    count, number = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    if count in (0, 1):
        return [(file, header)]
    match = SPLIT.fullmatch(file.name)
    if type(count) is not int or not 1 < count <= MAX_SPLITS or number != 0 or match is None or match[2] != "00001":
        raise CheckpointError(
            f"{file}: part {number} of {count} of a split file: expected the first, named "
            f"NAME-00001-of-{match[3] if match else '0000N'}.gguf, beside the others"
        )
    found = [(file, header)]
    for part in range(2, count + 1):
        other = file.with_name(f"{match[1]}-{part:05}-of-{count:05}.gguf")
        if not other.exists():
            raise CheckpointError(f"{other}: missing part {part} of {count}; download it again")
        own = read_gguf_header(other)
        if own.metadata.get("split.no") != part - 1 or own.metadata.get("split.count") != count:
            raise CheckpointError(f"{other}: is not part {part} of {count} of {file.name}")
        found.append((other, own))
    return found


def _name_map(header: GgufHeader) -> Any:
    """The library's map from Hugging Face's names to GGUF's."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    architecture = header.metadata["general.architecture"]
    found = next(known for known, name in MODEL_ARCH_NAMES.items() if name == architecture)
    blocks = header.metadata.get(f"{architecture}.block_count")
    return get_tensor_name_map(found, blocks if type(blocks) is int and 0 <= blocks <= 1000 else 0)


def _floats(file: Path, tensor: GgufTensor) -> list[float]:
    """The values of a small float32 tensor. Raises CheckpointError."""
    with open(open_regular(file), "rb") as stream:
        stream.seek(tensor.offset)
        data = stream.read(min(tensor.nbytes, MAX_DIVISORS))
    if tensor.kind != "F32" or len(data) != tensor.nbytes:
        raise CheckpointError(f"{file}: {tensor.name}: expected at most {MAX_DIVISORS} bytes of F32")
    return list(struct.unpack(f"<{len(data) // 4}f", data))
