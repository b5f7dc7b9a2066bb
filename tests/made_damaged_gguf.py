"""GGUF files for hypothesis, damaged by structure: a header as a JSON value, edited, and written whatever it holds."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from tests.made_damage import Damage, cut, edited
from tierlm.checkpoints.gguf_header import read_gguf_header

ALIGNMENT = 32


class WholeGguf:
    """A valid GGUF file. ``header``: a JSON value."""

    def __init__(self, file: Path):
        found, self.raw = read_gguf_header(file), file.read_bytes()
        self.begin = min(tensor.offset for tensor in found.tensors.values())
        self.header = {
            "metadata": found.metadata,
            "tensors": [
                [name, [*reversed(tensor.shape)], int(GGMLQuantizationType[tensor.kind]), tensor.offset - self.begin]
                for name, tensor in found.tensors.items()
            ],
        }

    def damaged(self, damage: Damage) -> bytes:
        """The file after ``damage``, of its header's values or of its bytes up to the first values of tensors."""
        kind, edits = damage
        if kind == "bytes":
            end = self.begin + 64
            return cut(self.raw[:end], edits) + self.raw[end:]
        return self.written(edited(self.header, edits))

    def written(self, header: Any = None) -> bytes:
        """The file with another header."""
        header = header or self.header
        return gguf_header(header.get("metadata"), header.get("tensors")) + self.raw[self.begin :]


def damaged_metadata(metadata: dict[str, Any], damage: Damage) -> bytes:
    """A GGUF file without tensors after ``damage``."""
    kind, edits = damage
    return cut(gguf_header(metadata), edits) if kind == "bytes" else gguf_header(edited(metadata, edits))


def gguf_header(metadata: Any, tensors: Any = None) -> bytes:
    pairs = [_text(key) + _value(value) for key, value in metadata.items()] if isinstance(metadata, dict) else []
    infos = [_info(each) for each in tensors] if isinstance(tensors, list) else []
    whole = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs + infos)
    return whole + bytes(-len(whole) % ALIGNMENT)


def _text(value: Any) -> bytes:
    data = (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _number(value: Any) -> int:
    return int(value) % 2**64 if isinstance(value, (int, float)) and abs(value) < 2**70 else 0


def _info(entry: Any) -> bytes:
    name, shape, kind, offset = [*(entry if isinstance(entry, list) else [entry]), 0, 0, 0, 0][:4]
    shape = [_number(size) for size in shape] if isinstance(shape, list) else [_number(shape)]
    end = struct.pack("<IQ", _number(kind) % 2**32, _number(offset))
    return _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + end


def _value(value: Any) -> bytes:
    """A value with its type; an array has the type of its first item, or of texts if its items differ."""
    if isinstance(value, list):
        items = [_value(item) for item in value]
        if len({item[:4] for item in items}) > 1 or any(isinstance(item, (list, dict)) for item in value):
            items = [struct.pack("<I", 8) + _text(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", 4)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int) and 0 <= value < 2**64:
        return struct.pack("<IQ", 10, value)
    if isinstance(value, int) and -(2**63) <= value < 0:
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    return struct.pack("<I", 8) + _text(value)
