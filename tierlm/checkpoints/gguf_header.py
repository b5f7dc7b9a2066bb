"""The header of a GGUF file: metadata, and where each tensor lies.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's reader takes 3 s for a
vocabulary of 49,000 tokens and trusts lengths; this one takes 0.1 s and checks each length against the file. No torch.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierlm.errors import CheckpointError, UnsupportedModelError, UsageError
from tierlm.files import Stamp, is_file, is_folder, open_regular

MAGIC = b"GGUF"
MAX_HEADER = 256 * 2**20  # bytes; ten times that of a vocabulary of 250,000 tokens with merges
FIRST_READ = 2**20  # bytes; enough for all but the vocabulary
MAX_ENTRIES = 2**17  # of metadata, and tensors
MAX_ITEMS = 2**22  # of arrays; one takes up to some 60 bytes. A vocabulary of 250,000 tokens has 1.3 million
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor: ``kind`` is GGML's name of its type, ``shape`` is row-major, as in numpy; ``row_bytes``: of its last
    dimension."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``digest``: identifies the header's bytes. ``stamp``: of the file when they were read."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    digest: bytes
    stamp: Stamp


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or the only one in a folder without safetensors; of a split one, the first.

    Raises UsageError if there are several."""
    if not is_folder(path):
        return path if path.suffix == ".gguf" and is_file(path) else None
    if any(path.glob("*.safetensors")):
        return None
    later = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf")
    found = [file for file in sorted(path.glob("*.gguf")) if not later.fullmatch(file.name)]
    if len(found) > 1:
        raise UsageError(f"{path}: expected one GGUF file, found {len(found)}: give one, such as {found[0]}")
    return found[0] if found else None


def read_gguf_header(file: Path) -> GgufHeader:
    """Raises CheckpointError and UnsupportedModelError."""
    try:
        with open(open_regular(file), "rb") as stream:
            stamp = Stamp.of(stream.fileno())
            size = stamp.size
            data = b""
            while True:
                data += stream.read(max(FIRST_READ, 3 * len(data)))
                whole = len(data) >= min(size, MAX_HEADER)
                try:
                    header, end = _parse(file, data, size)
                except (struct.error, IndexError) as error:  # the data ends within a value
                    if whole:
                        raise CheckpointError(
                            f"{file}: truncated, or a wrong header: it does not end within {len(data)} bytes; "
                            "download it again"
                        ) from error
                    continue
                return GgufHeader(*header, hashlib.sha256(data[:end]).digest(), stamp)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error


def _parse(file: Path, data: bytes, size: int) -> tuple[tuple[dict[str, Any], dict[str, GgufTensor]], int]:
    """Metadata, tensors, and the end of the header. Raises struct.error or IndexError if it exceeds ``data``."""
    cursor = _Cursor(file, data, size)
    if data[:4] != MAGIC:
        raise CheckpointError(f"{file}: not a GGUF file: expected {MAGIC!r}, found {data[:4]!r}")
    version = cursor.scalar("I", 4)
    if version not in (2, 3):
        raise UnsupportedModelError(f"{file}: GGUF version {version} is not supported; 2 and 3, little-endian, are")
    count, pairs = cursor.scalar("Q"), cursor.scalar("Q")
    if max(count, pairs) > MAX_ENTRIES:
        raise CheckpointError(f"{file}: expected at most {MAX_ENTRIES} tensors, and keys, found {count} and {pairs}")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.checked(pairs, 13)):
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{file}: duplicate metadata key {key[:100]!r}")
        metadata[key] = cursor.value(cursor.scalar("I"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise CheckpointError(f"{file}: general.alignment: expected 1 to {2**20}, found {str(alignment)[:100]}")
    infos = [_info(file, cursor) for _ in range(cursor.checked(count, 24))]
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{file}: duplicate tensor {name[:100]!r}")
        tensors[name] = _tensor(file, name, kind, shape, begin + offset, size)
    return (metadata, tensors), cursor.at


def _info(file: Path, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, dimensions = cursor.text(), cursor.scalar("I")
    if dimensions > 4:
        raise CheckpointError(f"{file}: {name[:100]}: expected at most 4 dimensions, found {dimensions}")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))
    return name, cursor.scalar("I"), shape[::-1], cursor.scalar("Q")


def _tensor(file: Path, name: str, kind: int, shape: tuple[int, ...], offset: int, size: int) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        type_ = GGMLQuantizationType(kind)
    except ValueError as error:
        raise UnsupportedModelError(f"{file}: {name[:100]} has GGML type {kind}, which is unknown") from error
    block, block_bytes = GGML_QUANT_SIZES[type_]
    columns = shape[-1] if shape else 1
    if columns % block:
        raise CheckpointError(
            f"{file}: {name[:100]}: rows of {columns} values are no multiple of {type_.name}'s {block}"
        )
    row_bytes = columns // block * block_bytes
    nbytes = math.prod(shape[:-1]) * row_bytes
    if offset + nbytes > size:
        raise CheckpointError(
            f"{file}: truncated, or a wrong header: {name[:100]} ends at byte {offset + nbytes}, the file has {size}; "
            "download it again"
        )
    return GgufTensor(name, type_.name, shape, offset, nbytes, row_bytes)


class _Cursor:
    """Reads values one after another. Raises struct.error or IndexError past the end of ``data``."""

    def __init__(self, file: Path, data: bytes, size: int):
        self.file, self.data, self.size, self.at = file, data, size, 0
        self.items = 0  # of arrays
        self._unpack: dict[str, Callable[..., tuple[Any, ...]]] = {
            code: struct.Struct("<" + code).unpack_from for code in SCALARS.values()
        }

    def scalar(self, code: str, at: int | None = None) -> Any:
        """``at``: skip to there first."""
        if at is not None:
            self.at = at
        (value,) = self._unpack[code](self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def checked(self, count: int, least: int) -> int:
        """``count`` values of at least ``least`` bytes each, if the file can hold them."""
        if count * least > self.size - self.at:
            raise CheckpointError(
                f"{self.file}: truncated, or a wrong header: {count} values at byte {self.at} of {self.size}"
            )
        return count

    def text(self) -> str:
        return self._bytes().decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(self._code(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        self.items += count
        if self.items > MAX_ITEMS:
            raise CheckpointError(f"{self.file}: expected at most {MAX_ITEMS} items of arrays, found {self.items}")
        if kind == STRING:
            return [self.text() for _ in range(self.checked(count, 8))]
        code = self._code(kind)
        width = struct.calcsize("<" + code)
        found = struct.unpack_from(f"<{self.checked(count, width)}{code}", self.data, self.at)
        self.at += count * width
        return list(found)

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"{self.file}: metadata at byte {self.at}: expected a type of 0 to 12, found {kind}")
        return SCALARS[kind]

    def _bytes(self) -> bytes:
        (length,) = self._unpack["Q"](self.data, self.at)
        end = self.at + 8 + self.checked(length, 1)
        if end > len(self.data):
            raise IndexError
        found, self.at = self.data[self.at + 8 : end], end
        return found
