"""A model's records: which bytes of a checkpoint each key stands for. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tierlm.errors import CheckpointError, UnsupportedModelError
from tierlm.models import family_of
from tierlm.spec import ExpertKey, Key, ModelSpec, TrunkKey
from tierlm.weights.checkpoint import Checkpoint, Record, TensorInfo, build_record, read_json

FLOATS = ("F32", "BF16", "F16")
HEAD_BLOCK_BYTES = 64 * 2**20  # the lm_head is used in blocks of rows of this size, so that it streams like a trunk
SCALE_BLOCK = 128
GATES = TrunkKey(-1)  # the small tensors that are always resident


class Catalog:
    """The spec and the records of a model folder, checked against each other when it is made.

    ``trunks``: the keys of all layers' trunks and then the blocks of the lm_head, in the order in which they run.
    Raises CheckpointError and UnsupportedModelError.
    """

    def __init__(self, folder: Path):
        where = folder / "config.json"
        config = read_json(where)
        self.family = family_of(config, str(where))
        self.spec: ModelSpec = self.family.read_spec(config, str(where))
        self.checkpoint = Checkpoint(folder)
        self.eos = self._eos(folder)
        spec = self.spec
        claimed = spec.layers + len(spec.moe_layers) * spec.experts
        if claimed > len(self.checkpoint.tensors):  # before anything of that size is built
            raise CheckpointError(
                f"{where}: {spec.layers} layers of {spec.experts} experts claimed, "
                f"{len(self.checkpoint.tensors)} tensors found"
            )
        self.embedding = self._plain(self.family.embedding_name(), (spec.vocab, spec.hidden))
        head = self._plain(self.family.head_name(spec), (spec.vocab, spec.hidden))
        rows = max(1, HEAD_BLOCK_BYTES // (head.nbytes // spec.vocab))
        self._head = [head.rows(at, min(at + rows, spec.vocab)) for at in range(0, spec.vocab, rows)]
        self.layers = [TrunkKey(layer) for layer in range(spec.layers)]
        self.head = [TrunkKey(spec.layers + block) for block in range(len(self._head))]
        self.trunks = self.layers + self.head
        keys: list[Key] = [*self.trunks, *self.experts()]
        self._records = {key: self._build(key) for key in keys}
        self._records[GATES] = build_record(self._tensors(self.family.gate_tensors(spec)))
        self.ignored = [name for name in self.checkpoint.tensors if self.family.ignored(spec, name)]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({tensor.file for tensor in self.checkpoint.tensors.values()})

    @property
    def fingerprint(self) -> str:
        """Tells this model from others: a hash of its config, and of its files' names and sizes."""
        digest = hashlib.sha256((self.checkpoint.folder / "config.json").read_bytes())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
        return digest.hexdigest()[:32]

    def experts(self) -> list[ExpertKey]:
        return [ExpertKey(layer, e) for layer in self.spec.moe_layers for e in range(self.spec.experts)]

    def record(self, key: Key) -> Record:
        return self._records[key]

    def size(self, key: Key) -> int:
        """Bytes of the slot that ``key`` needs."""
        return self._records[key].nbytes

    def _build(self, key: Key) -> Record:
        if isinstance(key, ExpertKey):
            return build_record(self._tensors(self.family.expert_tensors(self.spec, key)))
        if key.layer >= self.spec.layers:
            return build_record({"lm_head": self._head[key.layer - self.spec.layers]})
        return build_record(self._tensors(self.family.trunk_tensors(self.spec, key)))

    def _tensors(self, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
        """The tensors of some roles, and the block scales of those that are float8, as ``role.scale``."""
        found: dict[str, TensorInfo] = {}
        for role, (name, shape) in shapes.items():
            tensor = self.checkpoint.tensor(name, shape)
            found[role] = tensor
            if tensor.dtype == "F8_E4M3" and len(shape) == 2:
                blocks = tuple(-(-size // SCALE_BLOCK) for size in shape)
                scale = self.checkpoint.tensor(name + "_scale_inv", blocks)
                if scale.dtype != "F32":
                    raise UnsupportedModelError(f"{scale.file}: {scale.name} is {scale.dtype}; F32 is supported")
                found[role + ".scale"] = scale
            elif tensor.dtype not in FLOATS:
                raise UnsupportedModelError(
                    f"{tensor.file}: {name} is {tensor.dtype}; supported are {', '.join(FLOATS)}, and F8_E4M3 matrices "
                    "with their weight_scale_inv"
                )
        return found

    def _plain(self, name: str, shape: tuple[int, int]) -> TensorInfo:
        tensor = self.checkpoint.tensor(name, shape)
        if tensor.dtype not in FLOATS:
            raise UnsupportedModelError(f"{tensor.file}: {name} is {tensor.dtype}; supported are {', '.join(FLOATS)}")
        return tensor

    def _eos(self, folder: Path) -> tuple[int, ...]:
        """Ids that end a text: the config's, and those of ``generation_config.json``."""
        file = folder / "generation_config.json"
        extra: Any = read_json(file).get("eos_token_id") if file.exists() else None
        more = () if extra is None else tuple(extra) if isinstance(extra, list) else (extra,)
        eos = (*self.spec.eos, *more)
        if not all(isinstance(i, int) for i in eos):
            raise CheckpointError(f"{folder}: eos_token_id: expected token ids, found {eos!r}")
        return tuple(dict.fromkeys(eos))
