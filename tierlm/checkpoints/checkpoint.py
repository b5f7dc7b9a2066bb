"""A safetensors checkpoint read in place: the location of every tensor.

This file reads each header once and no tensor data. It validates lengths, offsets, overlaps and shard names before
anything is allocated. Specification: https://huggingface.co/docs/safetensors. No torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tierlm.checkpoints.codec import Compressed, least_and_most
from tierlm.checkpoints.multimodal import text_name
from tierlm.checkpoints.record import ALIGNMENT, TensorInfo
from tierlm.errors import CheckpointError, UnsupportedModelError, shown
from tierlm.files import Stamp, open_regular, read_regular

# Limits of JSON, in bytes and in values, which take up to some 100 bytes each. DeepSeek-V3 in a single file would have
# a header of 14 MB with 0.8 million values.
MAX_JSON = MAX_HEADER = 32 * 2**20
MAX_VALUES = 2**21
INSIDE = "tierlm.zstd"  # metadata key: the tensors inside each compressed record
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")  # its number follows the name of its layer's stack
STACK = re.compile(r".*\.experts\.[a-z_]+")
FUSED = {  # an expert's matrix -> stack, place and number of such matrices in it, one above the other
    "gate_proj.weight": ("gate_up_proj", 0, 2),
    "up_proj.weight": ("gate_up_proj", 1, 2),
    "down_proj.weight": ("down_proj", 0, 1),
}
ITEM_SIZE = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
ITEM_SIZE |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint file. Raises CheckpointError."""
    try:
        value = parse_json(read_regular(path, MAX_JSON))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model folder in Hugging Face layout has one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected readable JSON, found: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON of at most MAX_VALUES values. ``pairs``: makes the objects. Raises ValueError, RecursionError."""
    if (values := sum(map(text.count, b",[{"))) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES} values, found about {values}")
    return json.loads(text.decode("utf-8"), object_pairs_hook=pairs)


class Header(NamedTuple):
    """A parsed safetensors header. ``begin``: file offset of the tensor data; ``metadata``: free text; ``stamp``: of
    the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    begin: int
    stamp: Stamp


class Checkpoint:
    """The safetensors files of a model folder; see Container. ``tensors``: by ``text_name``; ``headers``: by file.

    ``endings``: of tensors' names -> what replaces them.
    """

    def __init__(self, folder: Path, endings: Mapping[str, str] = MappingProxyType({})):
        self.path = folder
        self._endings = endings
        self.tensors: dict[str, TensorInfo] = {}
        self.headers: dict[Path, Header] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._read_index(index)
            return
        files = [folder / "model.safetensors"]
        if not files[0].exists():
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder}: expected model.safetensors, or model.safetensors.index.json and its shards; found neither"
            )
        for file in files:
            self.headers[file] = read_header(file)
            for tensor in self.headers[file].tensors.values():
                self._add(tensor)

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: expected a 'weight_map' of tensor names to file names")
        headers: dict[str, Header] = {}
        for shard in sorted(set(weight_map.values())):
            file = index.parent / shard
            if os.path.basename(shard) != shard or shard in ("", ".", ".."):
                raise CheckpointError(f"{index}: expected shards in its own folder, found {shown(shard)}")
            if not os.path.exists(file):  # unlike Path.exists, false for a name that is too long
                raise CheckpointError(f"{file}: missing shard, named by {index.name}; download it again")
            headers[shard] = self.headers[file] = read_header(file)
        for name, shard in weight_map.items():
            if name not in headers[shard].tensors:
                raise CheckpointError(f"{index}: maps {name} to {shard}, which does not contain it")
            self._add(headers[shard].tensors[name])

    def _add(self, tensor: TensorInfo) -> None:
        name = text_name(tensor.name)
        for ending, other in self._endings.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + other
        if name in self.tensors:
            raise CheckpointError(f"{tensor.file}: tensor {name} is also in {self.tensors[name].file.name}")
        self.tensors[name] = tensor

    @property
    def count(self) -> int:
        stacks = [tensor for name, tensor in self.tensors.items() if STACK.fullmatch(name) and tensor.shape]
        return len(self.tensors) + sum(stack.shape[0] for stack in stacks if stack.nbytes)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        return {file: header.stamp for file, header in self.headers.items()}

    @property
    def digest(self) -> bytes:
        return read_regular(self.path / "config.json")

    def find(self, name: str) -> TensorInfo | None:
        """The tensor ``name``, or an expert's part of its layer's stack."""
        found = self.tensors.get(name)
        if found is not None or (expert := EXPERT.fullmatch(name)) is None:
            return found
        stack, number = self.tensors.get(f"{expert[1]}.{expert[3]}"), int(expert[2])
        place, count = 0, 1
        if stack is None and expert[3] in FUSED:
            name, place, count = FUSED[expert[3]]
            stack = self.tensors.get(f"{expert[1]}.{name}")
        if stack is None or stack.inside is not None or not stack.shape or number >= stack.shape[0]:
            return None
        whole = replace(stack.rows(number, number + 1), shape=stack.shape[1:])
        if count == 1 or len(whole.shape) != 2:
            return whole
        rows = whole.shape[0] // count
        return whole.rows(place * rows, (place + 1) * rows)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        """The tensor ``name``. Raises CheckpointError if it is missing or its shape is not ``shape``."""
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing ({len(self.tensors)} tensors found)")
        return check_shape(found, shape)


def check_shape(found: TensorInfo, shape: tuple[int, ...] | None) -> TensorInfo:
    """``found``, if its shape is ``shape``. Raises CheckpointError."""
    if shape is not None and found.shape != shape:
        raise CheckpointError(f"{found.file}: {found.name} has shape {list(found.shape)}, expected {list(shape)}")
    return found


def read_header(file: Path) -> Header:
    """Read and validate the header of a safetensors file. Raises CheckpointError."""
    try:
        with open(open_regular(file), "rb") as stream:
            stamp = Stamp.of(stream.fileno())
            size = stamp.size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file}: not a safetensors file, or truncated: header of {length} bytes in a file of {size}"
                )
            if length > MAX_HEADER:
                raise CheckpointError(f"{file}: expected a header of at most {MAX_HEADER} bytes, found {length}")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    try:
        header = parse_json(text, _unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: safetensors header is {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: header: expected strings under __metadata__, found {shown(metadata)}")
    begin = 8 + length
    tensors = {name: _tensor(file, name, entry, begin, size) for name, entry in header.items()}
    tensors_inside = _inside(file, tensors, metadata.get(INSIDE, "{}"))
    previous: TensorInfo | None = None
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            raise CheckpointError(
                f"{file}: wrong header: {tensor.name} at offset {tensor.offset} overlaps {previous.name}, "
                f"which ends at {previous.offset + previous.nbytes}"
            )
        previous = tensor
    return Header(tensors | tensors_inside, metadata, begin, stamp)


def _inside(file: Path, tensors: Mapping[str, TensorInfo], text: str) -> dict[str, TensorInfo]:
    """The tensors inside compressed records. ``text``: JSON, stored tensor -> [checksum, name -> [dtype, shape]]."""
    found: dict[str, TensorInfo] = {}
    try:
        for outer, (checksum, entries) in parse_json(text.encode()).items():
            stored, raw, parts = tensors[outer], 0, []
            for name, (dtype, shape) in entries.items():
                numbers = all(type(number) is int and number >= 0 for number in shape)
                if not numbers or name in tensors or name in found:
                    raise ValueError(f"{name}: {dtype} {shape}")
                nbytes = math.prod(shape) * ITEM_SIZE[dtype]
                parts.append(TensorInfo(name, file, stored.offset + raw, nbytes, dtype, tuple(shape)))
                raw += nbytes
            inside = Compressed(
                stored.offset, stored.nbytes, tuple((part.nbytes, ITEM_SIZE[part.dtype]) for part in parts), checksum
            )
            least, most = least_and_most(inside.runs)
            if not 0 < least <= stored.nbytes <= most or stored.offset % ALIGNMENT or not isinstance(checksum, str):
                raise ValueError(f"{outer}: {stored.nbytes} bytes at {stored.offset} for {raw}, {checksum}")
            found |= {part.name: replace(part, inside=inside) for part in parts}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file}: header: {INSIDE} is malformed ({error}); pack the model again") from error
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name!r}")
        found[name] = value
    return found


def _tensor(file: Path, name: str, entry: Any, begin: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, stop)
        well_formed = isinstance(dtype, str) and len(shape) <= 64
        well_formed &= all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{file}: header entry of {name} is malformed: {shown(entry)}")
    if dtype not in ITEM_SIZE:
        raise UnsupportedModelError(f"{file}: {name} has dtype {dtype}; supported are {', '.join(ITEM_SIZE)}")
    nbytes = math.prod(shape) * ITEM_SIZE[dtype]
    if stop - start != nbytes:
        raise CheckpointError(
            f"{file}: wrong header: {name} {dtype}{list(shape)} takes {nbytes} bytes, its offsets span {stop - start}"
        )
    if begin + stop > size:
        raise CheckpointError(
            f"{file}: truncated, or wrong header: {name} ends at byte {begin + stop}, the file has {size}; "
            "download it again"
        )
    return TensorInfo(name, file, begin + start, nbytes, dtype, shape)
