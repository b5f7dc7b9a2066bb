"""The tensors of a checkpoint: routed experts as records for tierlm, all others as a state dict for transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from tierlm.checkpoints.checkpoint import Checkpoint, check_shape
from tierlm.checkpoints.container import files_of, fingerprint_of
from tierlm.checkpoints.packed import read_seals
from tierlm.checkpoints.record import Place, Record, TensorInfo, build_record
from tierlm.checkpoints.stored import StoredWeight, by_role, find_weight
from tierlm.errors import CheckpointError, UnsupportedModelError
from tierlm.files import Stamp
from tierlm.formats import FORMATS
from tierlm.integrations.transformers.layout import DOWN, GATE_UP, Layout, Source
from tierlm.kernels import Weight, widen
from tierlm.spec import ExpertKey, Key

QUANTISED = {format.dtype for format in FORMATS.values() if format.loadable and format.matrices_only}


class ExpertRecords:
    """The records of the routed experts of ``outline``, a model on the meta device. Layer i of a key is the i-th of
    ``layers``, the names of the experts modules. Raises CheckpointError, UnsupportedModelError."""

    def __init__(self, folder: Path, outline: PreTrainedModel):
        self.checkpoint = Checkpoint(folder)
        for file, header in self.checkpoint.headers.items():
            if read_seals(file, header):
                raise UnsupportedModelError(f"{file}: expected a model as it was published, found a packed store")
        self._layout = Layout(outline, self.checkpoint)
        self.layers = self._layout.layers
        self.counts = [self._layout.shapes[f"{layer}.{GATE_UP}"][0] for layer in self.layers]  # of experts
        self._places: dict[tuple[tuple[str, Place], ...], Mapping[str, Place]] = {}
        self._records = {key: self._build(key) for key in self.experts()}

    @property
    def files(self) -> list[Path]:
        return files_of(self.checkpoint)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        return self.checkpoint.stamps

    @property
    def fingerprint(self) -> str:
        return f"{fingerprint_of(self.checkpoint)}-experts"  # a Catalog's keys have other layers

    @property
    def widest(self) -> tuple[int, int]:
        """The largest input and the largest inner width of an expert."""
        shapes = [self._layout.shapes[f"{layer}.{GATE_UP}"] for layer in self.layers]
        return max(hidden for _, _, hidden in shapes), max(double // 2 for _, double, _ in shapes)

    def experts(self) -> list[ExpertKey]:
        return [ExpertKey(layer, expert) for layer, count in enumerate(self.counts) for expert in range(count)]

    def record(self, key: Key) -> Record:
        assert isinstance(key, ExpertKey)
        return self._records[key]

    def size(self, key: Key) -> int:
        return self.record(key).nbytes

    def _build(self, key: ExpertKey) -> Record:
        """The record of one expert: gate_proj, up_proj and down_proj."""
        layer = self.layers[key.layer]
        _, double, hidden = self._layout.shapes[f"{layer}.{GATE_UP}"]
        width = double // 2
        (down,) = self._matrices(f"{layer}.{DOWN}", key.expert, hidden, width)
        both = self._matrices(f"{layer}.{GATE_UP}", key.expert, double, hidden)
        gate, up = both if len(both) == 2 else (_rows(both[0], 0, width), _rows(both[0], width, double))
        record = build_record(by_role({"gate_proj": gate, "up_proj": up, "down_proj": down}))
        # Equal layouts share one mapping, so that views are compared by identity.
        return replace(record, places=self._places.setdefault(tuple(record.places.items()), record.places))

    def _matrices(self, target: str, expert: int, outs: int, ins: int) -> list[StoredWeight]:
        source: Source = self._layout.sources[target]
        shape = outs // len(source.names), ins
        if source.stacked:
            return [find_weight(_Part(self.checkpoint, expert), name, shape) for (name,) in source.names]
        return [find_weight(self.checkpoint, names[expert], shape) for names in source.names]

    def rest(self, stack: ExitStack, dtype: torch.dtype) -> dict[str, Any]:
        """The state dict for transformers: of each stack of experts no expert; quantised weights widened to ``dtype``;
        other tensors are read when they are loaded, while the files that ``stack`` closes are open."""
        layout, files = self._layout, {f: stack.enter_context(safe_open(f, framework="pt")) for f in self.files}
        names = {name for source in layout.sources.values() for names in source.names for name in names}
        modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        others = {
            key: tensor
            for key, tensor in self.checkpoint.tensors.items()
            if key.rpartition(".")[0] not in modules and not {key, key.rpartition("_")[0]} & names
        }
        found: dict[str, Any] = {name: torch.empty(0, *layout.shapes[name][1:], dtype=dtype) for name in layout.sources}
        for target, weight in self._quantised(others):
            parts = [files[part.file].get_tensor(part.name) for part in weight.parts.values()]
            data, scale, extra = FORMATS[weight.format].divide(parts)
            wide = widen(Weight(data, weight.format, scale, weight.shape, extra=extra))
            found[target] = wide.to(dtype)
            for suffix in weight.parts:
                others.pop(weight.name + suffix, None)
        for key, tensor in others.items():
            used = any(target in layout.shapes or pattern for _, target, pattern in layout.targets(key, tensor))
            if used and tensor.dtype in QUANTISED:
                raise UnsupportedModelError(f"{tensor.file}: {tensor.name}: {tensor.dtype} is for matrices alone")
            found[tensor.name] = files[tensor.file].get_slice(tensor.name)
        return found

    def _quantised(self, tensors: Mapping[str, TensorInfo]) -> list[tuple[str, StoredWeight]]:
        """The quantised matrices of ``tensors``, with the parameters that they become."""
        found = []
        for key, tensor in tensors.items():
            for name, target, pattern in self._layout.targets(key, tensor):
                shape = self._layout.shapes.get(target, ())
                if tensor.dtype in QUANTISED and pattern is None and len(shape) == 2:
                    found.append((target, find_weight(self.checkpoint, name, shape)))
        return found


@dataclass(frozen=True)
class _Part:
    """One expert's part of the stacks in a checkpoint."""

    checkpoint: Checkpoint
    expert: int

    def find(self, name: str) -> TensorInfo | None:
        stack = self.checkpoint.find(name)
        if stack is None or len(stack.shape) < 2 or self.expert >= stack.shape[0]:
            return None
        return replace(stack.rows(self.expert, self.expert + 1), shape=stack.shape[1:])

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        if (found := self.find(name)) is None:
            raise CheckpointError(f"{self.checkpoint.path}: {name}: expected expert {self.expert} in it, found none")
        return check_shape(found, shape)


def _rows(weight: StoredWeight, start: int, stop: int) -> StoredWeight:
    """Rows of a matrix."""
    total, block = weight.shape[0], FORMATS[weight.format].block[0]
    if start % block or stop % block:
        raise UnsupportedModelError(f"{weight.name}: gate and up share blocks of {block} rows in {weight.format}")

    def part(whole: TensorInfo) -> TensorInfo:
        if math.prod(whole.shape) == 1:  # a factor
            return whole
        step = total // whole.shape[0]
        return whole.rows(start // step, stop // step)

    return StoredWeight(
        weight.name, (stop - start, *weight.shape[1:]), weight.format, {s: part(p) for s, p in weight.parts.items()}
    )
