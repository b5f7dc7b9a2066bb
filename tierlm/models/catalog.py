"""A model's records: the bytes of a checkpoint behind each key. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tierlm.checkpoints.checkpoint import read_json
from tierlm.checkpoints.checksum import Seal
from tierlm.checkpoints.container import describe, files_of, fingerprint_of
from tierlm.checkpoints.multimodal import others
from tierlm.checkpoints.packed import read_seals, row_block, row_blocks
from tierlm.checkpoints.record import Place, Record, TensorInfo, build_record, compressed
from tierlm.checkpoints.staging import arriving_in
from tierlm.checkpoints.stored import StoredWeight, by_role, find_weight
from tierlm.errors import CheckpointError, UnsupportedModelError
from tierlm.files import Stamp
from tierlm.formats import FORMATS
from tierlm.models import family_of, read_spec
from tierlm.models.config_reader import Fields
from tierlm.planning.cost import Formats
from tierlm.spec import ExpertKey, HeadKey, Key, ResidentKey, TrunkKey, UnitKey

HEAD_BLOCK_BYTES = 64 * 2**20  # size of the lm_head's blocks of rows, so that it streams like a trunk


class Catalog:
    """The spec and the records of a model folder, checked against each other on construction.

    ``mtp``: with a layer of multi-token prediction, after the model's own.
    ``trunks``: keys of the model's trunks, of the lm_head's blocks, and of that layer's trunk, in execution order;
    ``head_weights``: those blocks. ``compressed``: some records are compressed. Raises CheckpointError and
    UnsupportedModelError; UsageError if there is no layer for ``mtp``.
    """

    def __init__(self, path: Path, mtp: bool = False):
        described = describe(path)
        where = described.where
        self.family = family_of(described.config.get("model_type"), where)
        spec = self.spec = read_spec(described.config, where, mtp)
        self.checkpoint = described.open()
        self.eos = self._eos(path)
        claimed = len(spec.layers) + len(spec.moe_layers) * spec.experts
        found = self.checkpoint.count
        if claimed > found:  # checked before allocating that many keys
            raise CheckpointError(
                f"{where}: {len(spec.layers)} layers of {spec.experts} experts claimed, {found} tensors found"
            )
        table = {"embedding": self._row_by_row(self.family.embedding_name(), (spec.vocab, spec.hidden))}
        self.embedding = by_role(table)["embedding"]
        self._seals = {file: read_seals(file, header) for file, header in self.checkpoint.headers.items()}
        self.head_weights = self._head_blocks(self.family.head_name(spec))
        self.layers = [TrunkKey(layer) for layer in range(len(spec.layers))]
        self.head = [HeadKey(block) for block in range(len(self.head_weights))]
        self.trunks: list[UnitKey] = [*self.layers[: spec.depth], *self.head, *self.layers[spec.depth :]]
        keys: list[Key] = [*self.trunks, *self.experts(), ResidentKey()]
        self._layouts: dict[tuple[tuple[str, Place], ...], Mapping[str, Place]] = {}
        self._records = {key: self._build(key) for key in keys}
        self.compressed = any(record.inside is not None for record in self._records.values())
        last, names = len(spec.layers) - 1, self.checkpoint.tensors
        self.ignored = [name for name in names if _layer(name) > last or name.startswith("mtp.")]
        self.vision = others(self.checkpoint.tensors)

    @property
    def files(self) -> list[Path]:
        """The files that contain the tensors."""
        return files_of(self.checkpoint)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """The stamp of each file without checksums when its header was read; of none that still arrives."""
        if arriving_in(self.checkpoint.path) is not None:
            return {}
        return {file: self.checkpoint.stamps[file] for file in self.files if not self._seals.get(file)}

    @property
    def formats(self) -> Formats:
        """The formats of the matrices in routed experts, trunks and the lm_head."""
        spec, family = self.spec, self.family
        trunk = self._format(family.trunk_tensors(spec, TrunkKey(0)))
        experts = [self._format(family.expert_tensors(spec, key)) for key in self.experts()[:1]]
        return Formats((experts or [trunk])[0], trunk, self.head_weights[0].format)

    @property
    def sealed(self) -> bool:
        """Whether this is a packed store; its records have checksums."""
        return bool(self._seals) and all(self._seals.values())

    @property
    def fingerprint(self) -> str:
        """Identifies this model."""
        return fingerprint_of(self.checkpoint)

    def experts(self) -> list[ExpertKey]:
        return [ExpertKey(layer, e) for layer in self.spec.moe_layers for e in range(self.spec.experts)]

    def record(self, key: Key) -> Record:
        return self._records[key]

    def size(self, key: Key) -> int:
        """Bytes of a slot for ``key``."""
        return self._records[key].nbytes

    def seals_of(self, tensor: TensorInfo) -> list[Seal]:
        """The seals within a tensor, if its file has any."""
        end = tensor.offset + tensor.nbytes
        return [seal for at, seal in self._seals.get(tensor.file, {}).items() if tensor.offset <= at < end]

    def stored_share(self, keys: Sequence[Key]) -> float:
        """Bytes read for ``keys``, as a fraction of their slots."""
        read = sum(extent.hi - extent.lo for key in keys for extent in self._records[key].extents)
        return read / sum(map(self.size, keys)) if keys else 1.0

    def _build(self, key: Key) -> Record:
        if isinstance(key, ExpertKey):
            tensors = self._tensors(self.family.expert_tensors(self.spec, key))
        elif isinstance(key, TrunkKey):
            tensors = self._tensors(self.family.trunk_tensors(self.spec, key))
        elif isinstance(key, HeadKey):
            tensors = by_role({"lm_head": self.head_weights[key.block]})
        else:
            tensors = self._tensors(self.family.resident_tensors(self.spec))
        record = build_record(tensors)
        # Equal layouts share one mapping, so that views are compared by identity.
        places = self._layouts.setdefault(tuple(record.places.items()), record.places)
        return self._sealed(replace(record, places=places))

    def _sealed(self, record: Record) -> Record:
        """The record with its seal, if its file has any."""
        for extent in record.extents:
            inside = extent.tensors[0].inside
            seals = self._seals.get(extent.file, {})
            if seals or inside is not None:
                seal = seals.get(extent.start)
                claimed = extent.stop - extent.start
                if inside is not None:
                    claimed = inside.nbytes if claimed == inside.raw else -1
                if len(record.extents) > 1 or seal is None or seal.nbytes != claimed:
                    raise CheckpointError(
                        f"{extent.file}: {extent.tensors[0].name} at offset {extent.start}: expected a record as it "
                        "was packed, found something else; pack the model again"
                    )
                record = replace(record, seal=seal)
                return record if inside is None else compressed(record, inside)
        return record

    def stored(self, name: str, shape: tuple[int, ...]) -> StoredWeight:
        """The weight ``name``, in its stored format. Raises CheckpointError, UnsupportedModelError."""
        return find_weight(self.checkpoint, name, shape)

    def _tensors(self, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
        return by_role({role: self.stored(*named) for role, named in shapes.items()})

    def _format(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
        """The format of the largest tensor."""
        return self.stored(*max(tensors.values(), key=lambda named: math.prod(named[1]))).format

    def _head_blocks(self, name: str) -> list[StoredWeight]:
        """The lm_head in blocks of rows: as packed, or of HEAD_BLOCK_BYTES."""
        vocab, hidden = self.spec.vocab, self.spec.hidden
        packed = row_blocks(name, self.checkpoint.tensors)
        if packed:
            edges = [0, *(stop for _, stop in packed)]
            if [start for start, _ in packed] != edges[:-1] or edges[-1] != vocab:
                where = self.checkpoint.path
                raise CheckpointError(f"{where}: the blocks of {name} do not make up its {vocab} rows: {packed}")
            return [self.stored(row_block(name, *rows), (rows[1] - rows[0], hidden)) for rows in packed]
        weight = self._row_by_row(name, (vocab, hidden))
        head = weight.parts[""]
        step = max(1, HEAD_BLOCK_BYTES // (head.nbytes // vocab))
        blocks = [(at, min(at + step, vocab)) for at in range(0, vocab, step)]
        return [
            StoredWeight(row_block(name, *rows), (rows[1] - rows[0], hidden), weight.format, {"": head.rows(*rows)})
            for rows in blocks
        ]

    def _row_by_row(self, name: str, shape: tuple[int, int]) -> StoredWeight:
        """A weight whose rows are read one by one."""
        tensor = self.checkpoint.tensor(name)
        known = [each.dtype for each in FORMATS.values() if each.takes(shape) and len(each.parts(shape)) == 1]
        if tensor.dtype not in known or len((weight := self.stored(name, shape)).parts) > 1:
            raise UnsupportedModelError(f"{tensor.file}: {name} is {tensor.dtype}; supported are {', '.join(known)}")
        if tensor.inside is not None:
            raise UnsupportedModelError(f"{tensor.file}: {name} is compressed; its rows are read one by one")
        return weight

    def _eos(self, folder: Path) -> tuple[int, ...]:
        """End-of-text ids from ``config.json`` and ``generation_config.json``."""
        file = folder / "generation_config.json"
        more = Fields(read_json(file), str(file)).token_ids("eos_token_id") if file.exists() else ()
        return tuple(dict.fromkeys((*self.spec.eos, *more)))


def _layer(name: str) -> int:
    """The layer of a tensor, by its name in safetensors or GGUF; -1: of no layer."""
    found = re.match(r"(?:model\.layers|blk)\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1
