"""What a packed store of a model consists of: its records, by file, and the layout that each weight is to have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from tierlm.errors import UsageError
from tierlm.models.catalog import Catalog
from tierlm.spec import ExpertKey, TrunkKey
from tierlm.weights.checksum import ALGORITHM
from tierlm.weights.layouts import LAYOUTS, TILE_COLUMNS, TILE_ROWS, StoredWeight
from tierlm.weights.pack import PackedRecord, Packing, Progress, pack
from tierlm.weights.packed import VERSION

KEEP = "keep"
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.jinja",
    "LICENSE*",
)


def pack_model(folder: Path, out: Path, *, experts: str, trunk: str, progress: Progress | None = None) -> None:
    """Write the model of ``folder`` as a packed store to ``out``, a new folder.

    ``experts``, ``trunk``: the layouts of the routed experts' matrices, and of those that every token uses, by name, or
    "keep". Norms, routers and the embedding stay as they are; layers for multi-token prediction are left out. Raises
    UsageError, CheckpointError, StorageError.
    """
    for what, name in (("experts", experts), ("trunk", trunk)):
        if name not in (KEEP, *LAYOUTS):
            raise UsageError(f"{what}: expected one of {KEEP}, {', '.join(LAYOUTS)}, found {name!r}")
    if folder.resolve() in out.resolve().parents:
        raise UsageError(f"{out}: lies in the folder of the model, in which nothing is written; choose another")
    catalog = Catalog(folder)
    files = records_of(catalog, experts, trunk)
    beside = {
        file.name: file.read_bytes() for pattern in BESIDE for file in sorted(folder.glob(pattern)) if file.is_file()
    }
    config = json.loads(beside["config.json"])
    packings = (packing for records in files.values() for record in records for packing in record.packings)
    if "quantization_config" in config and any(packing.target != packing.weight.layout for packing in packings):
        del config["quantization_config"]  # it speaks of a layout that not all weights have any more
        beside["config.json"] = json.dumps(config, indent=2).encode()
    pack(files, beside, out, describe(catalog, experts, trunk), progress)


def records_of(catalog: Catalog, experts: str, trunk: str) -> dict[str, list[PackedRecord]]:
    """The files of the packed store, name -> records: one for each layer, and three for what is no layer's."""
    spec, family = catalog.spec, catalog.family

    def record(name: str, weights: Mapping[str, tuple[str, tuple[int, ...]]], target: str) -> PackedRecord:
        return PackedRecord(name, [_packing(catalog.stored(*weight), target) for weight in weights.values()])

    files = {
        "embedding.safetensors": [
            PackedRecord(
                "embedding", [_packing(catalog.stored(family.embedding_name(), (spec.vocab, spec.hidden)), KEEP)]
            )
        ],
        "gates.safetensors": [record("gates", family.gate_tensors(spec), KEEP)],
    }
    for layer in range(spec.layers):
        records = [record(f"trunk of layer {layer}", family.trunk_tensors(spec, TrunkKey(layer)), trunk)]
        for expert in range(spec.experts if spec.is_moe(layer) else 0):
            weights = family.expert_tensors(spec, ExpertKey(layer, expert))
            records.append(record(f"expert {expert} of layer {layer}", weights, experts))
        files[f"layer-{layer:05}.safetensors"] = records
    files["head.safetensors"] = [
        PackedRecord(f"block {block} of the lm_head", [_packing(weight, trunk)])
        for block, weight in enumerate(catalog.head_weights)
    ]
    return files


def describe(catalog: Catalog, experts: str, trunk: str) -> dict[str, Any]:
    """The settings of a pack, and which files it was made from."""
    files = {}
    for file, header in catalog.checkpoint.headers.items():
        status = file.stat()
        with open(file, "rb") as stream:
            digest = xxhash.xxh3_64_hexdigest(stream.read(header.begin))
        files[file.name] = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "header_xxh3_64": digest}
    source = {"name": catalog.checkpoint.folder.resolve().name, "fingerprint": catalog.fingerprint, "files": files}
    packed = {"experts": experts, "trunk": trunk, "tile": [TILE_ROWS, TILE_COLUMNS], "checksum": ALGORITHM}
    return {"version": VERSION, "packed": packed, "source": source}


def _packing(weight: StoredWeight, target: str) -> Packing:
    """A weight that has the layout already, and a vector, stay as they are."""
    kept = target == KEEP or len(weight.shape) != 2
    return Packing(weight, weight.layout if kept else LAYOUTS[target])
