"""The contents of a model's packed store: the records of each file, and the target format of each weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from tierlm.checkpoints.checkpoint import ITEM_SIZE
from tierlm.checkpoints.checksum import ALGORITHM
from tierlm.checkpoints.codec import load_zstandard, measure
from tierlm.checkpoints.disk_profile import ProfileCache, disk_name
from tierlm.checkpoints.multimodal import text_config
from tierlm.checkpoints.pack import AHEAD, PackedRecord, Packing, Progress, memory_of, pack, raw_bytes, unfinished
from tierlm.checkpoints.packed import VERSION
from tierlm.checkpoints.probe import find_profile
from tierlm.checkpoints.reader import open_reader
from tierlm.checkpoints.rows import block_of_rows
from tierlm.checkpoints.stored import StoredWeight
from tierlm.config import format_size
from tierlm.errors import BudgetError, UnsupportedModelError, UsageError
from tierlm.files import open_regular, read_regular, user_cache
from tierlm.formats import FORMATS
from tierlm.formats.tiles import GROUP, LANES
from tierlm.host import available_ram, process_ram
from tierlm.models.catalog import Catalog
from tierlm.planning.plan import AUTO_RAM, SLACK
from tierlm.spec import ExpertKey, ResidentKey

KEEP = "keep"
CODECS = ("none", "zstd", "auto")
PLAIN = ("embedding.safetensors", "resident.safetensors")  # never compressed: one is read row by row, one is small
SAMPLES = 4  # records compressed to measure the speed of decompression
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tiktoken.model",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.jinja",
    "LICENSE*",
)


def pack_model(
    folder: Path,
    out: Path,
    *,
    experts: str,
    trunk: str,
    codec: str = "none",
    ram: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the model in ``folder`` as a packed store to the new folder ``out``.

    ``experts``, ``trunk``: the format of the routed experts' and of all other matrices, by name, or "keep". Norms,
    routers and the embedding keep theirs, but an embedding in a format of GGUF becomes float32; layers for multi-token
    prediction and vision are omitted. ``codec``: "zstd" compresses the float records, "none" nothing; "auto" calls
    ``choose_codec``. ``say`` receives messages about the codec. ``ram``: limit of the process in bytes; None: most of
    the free memory. Raises UsageError, BudgetError, CheckpointError, StorageError.
    """
    if codec not in CODECS:
        raise UsageError(f"codec: expected one of {', '.join(CODECS)}, found {codec!r}")
    for what, name in (("experts", experts), ("trunk", trunk)):
        known = [KEEP, *(format.name for format in FORMATS.values() if format.packable)]
        if name not in known:
            raise UsageError(f"{what}: expected one of {', '.join(known)}, found {name!r}")
    if folder.is_file():
        raise UnsupportedModelError(f"{folder}: a GGUF file cannot be packed; it is read in place")
    if folder.resolve() in out.resolve().parents:
        raise UsageError(f"{out}: is inside the model's folder, which is never modified; choose another folder")
    catalog = Catalog(folder)
    files = records_of(catalog, experts, trunk)
    if codec == "auto":
        codec, why = choose_codec(catalog, files, out)
        if say is not None:
            say(f"codec {codec}: {why}")
    if codec == "zstd":
        load_zstandard()  # fails early if it is not installed
        files = compressed(files)
        count, total = len(_compressed_records(files)), sum(map(len, files.values()))
        if not count:
            raise UsageError(
                "codec zstd: no record contains only floats, and int8 and int4 gain too little to be compressed; "
                "choose other formats (--experts keep --trunk keep) or codec none"
            )
        if say is not None:
            say(f"codec zstd: {count} of {total} records are compressed")
    queued = _queued(files, ram)
    beside = {
        str(file.relative_to(folder)): read_regular(file)
        for pattern in BESIDE
        for file in sorted(folder.glob(pattern))
        if file.is_file()
    }
    published = json.loads(beside["config.json"])
    config = dict(text_config(published))
    packings = (packing for records in files.values() for record in records for packing in record.packings)
    if "quantization_config" in config and any(packing.target != packing.weight.format for packing in packings):
        del config["quantization_config"]  # no longer true for all weights
        if catalog.spec.moe is not None and catalog.spec.moe.stacked:
            config["experts_transposed"] = catalog.spec.moe.transposed  # else told by quantization_config
    if config != published:
        beside["config.json"] = json.dumps(config, indent=2).encode()
    sources = catalog.checkpoint.stamps
    pack(files, beside, out, describe(catalog, experts, trunk, codec), sources, progress, queued)


def least_memory(catalog: Catalog, experts: str, trunk: str, process: int) -> int:
    """The least ``ram`` that packs a model without a codec, in bytes. ``process``: of interpreter and libraries."""
    return process + SLACK + memory_of(records_of(catalog, experts, trunk), 1)


def _queued(files: Mapping[str, Sequence[PackedRecord]], ram: int | None) -> int:
    """How many matrices or pieces may be queued between two stages of a pack. Raises BudgetError."""
    process = process_ram()
    given = int((available_ram() + process) * AUTO_RAM) if ram is None else ram
    needs = {queued: process + SLACK + memory_of(files, queued) for queued in range(1, AHEAD + 1)}
    if given < needs[1]:
        what = "free memory" if ram is None else "ram budget"
        raise BudgetError(
            f"{what} of {format_size(given)} is below the {format_size(needs[1])} that packing needs: interpreter and "
            f"libraries {format_size(process)}, slack {format_size(SLACK)}, a few of the largest matrices "
            f"{format_size(memory_of(files, 1))}. Raise the ram budget",
            floor=needs[1],
            given=given,
            dominant="matrices" if memory_of(files, 1) > process else "interpreter and libraries",
        )
    return max(queued for queued, need in needs.items() if need <= given)


def records_of(catalog: Catalog, experts: str, trunk: str) -> dict[str, list[PackedRecord]]:
    """The files of the packed store, name -> records: one per layer, plus embedding, resident tensors and lm_head."""
    spec, family = catalog.spec, catalog.family

    def record(name: str, weights: Mapping[str, tuple[str, tuple[int, ...]]], target: str) -> PackedRecord:
        return PackedRecord(name, [_packing(catalog.stored(*weight), target) for weight in weights.values()])

    embedding = catalog.stored(family.embedding_name(), (spec.vocab, spec.hidden))
    kept = _keepable(embedding)
    table = PackedRecord("embedding", [_packing(embedding, KEEP if kept else "f32")])
    files = {
        "embedding.safetensors": [replace(table, block=block_of_rows(table.shape().nbytes // spec.vocab))],
        "resident.safetensors": [record(str(ResidentKey()), family.resident_tensors(spec), KEEP)],
    }
    for key in catalog.layers:
        records = [record(str(key), family.trunk_tensors(spec, key), trunk)]
        for expert in range(spec.experts if key.layer in spec.moe_layers else 0):
            own = ExpertKey(key.layer, expert)
            records.append(record(str(own), family.expert_tensors(spec, own), experts))
        files[f"layer-{key.layer:05}.safetensors"] = records
    files["head.safetensors"] = [
        PackedRecord(str(key), [_packing(weight, trunk)])
        for key, weight in zip(catalog.head, catalog.head_weights, strict=True)
    ]
    return files


def compressed(files: Mapping[str, Sequence[PackedRecord]]) -> dict[str, list[PackedRecord]]:
    """The same files, with the float records of experts, trunks and the lm_head marked for compression."""
    return {
        name: [replace(record, compress=name not in PLAIN and record.floats) for record in records]
        for name, records in files.items()
    }


def choose_codec(catalog: Catalog, files: Mapping[str, Sequence[PackedRecord]], out: Path) -> tuple[str, str]:
    """The codec for ``files`` on the disk of ``out``, and the reason: zstd if decompression, with as many threads as
    the disk's read depth, keeps up with the disk. An unfinished pack keeps its codec."""
    if (description := unfinished(out)) is not None:
        return description["packed"].get("codec", "none"), "continues an unfinished pack"
    records = sorted(_compressed_records(compressed(files)), key=lambda record: record.shape().nbytes)
    if not records:
        return "none", "no record contains only floats"
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    cache = ProfileCache(user_cache())
    profile, name = cache.get(folder), disk_name(folder)
    if profile is None and folder.stat().st_dev == catalog.files[0].stat().st_dev:
        reader, _ = open_reader("auto", catalog.files)
        with closing(reader):
            profile, _ = find_profile(reader, catalog.files, "auto", cache)
    if profile is None or profile.bytes_per_second is None:
        return "none", f"the speed of {name} is unknown; running a model of 1 GiB or more from it measures it"
    middle = len(records) // 2  # an expert, if there are any
    share, speed = measure([raw_bytes(record) for record in records[middle : middle + SAMPLES]], profile.depth)
    wanted = profile.bytes_per_second / share
    found = f"{share:.0%} of the bytes remain; {profile.depth} threads decompress {speed / 1e9:.2f} GB/s, {name}"
    return "zstd" if speed >= wanted else "none", f"{found} would deliver {wanted / 1e9:.2f} GB/s compressed"


def _compressed_records(files: Mapping[str, Sequence[PackedRecord]]) -> list[PackedRecord]:
    return [record for records in files.values() for record in records if record.compress]


def describe(catalog: Catalog, experts: str, trunk: str, codec: str) -> dict[str, Any]:
    """The settings of a pack, and its source files."""
    files = {}
    for file, header in catalog.checkpoint.headers.items():
        size, modified, *_ = header.stamp
        with open(open_regular(file), "rb") as stream:
            digest = xxhash.xxh3_64_hexdigest(stream.read(header.begin))
        files[file.name] = {"bytes": size, "modified_ns": modified, "header_xxh3_64": digest}
    source = {"name": catalog.checkpoint.path.resolve().name, "fingerprint": catalog.fingerprint, "files": files}
    packed = {"experts": experts, "trunk": trunk, "tile": [LANES, GROUP], "checksum": ALGORITHM}
    if codec != "none":
        packed["codec"] = codec
    return {"version": VERSION, "packed": packed, "source": source}


def _keepable(weight: StoredWeight) -> bool:
    """Whether its tensors have dtypes of safetensors."""
    return all(part.dtype in ITEM_SIZE for part in weight.parts.values())


def _packing(weight: StoredWeight, target: str) -> Packing:
    """Vectors always keep their format."""
    kept = target == KEEP or len(weight.shape) != 2
    if kept and not _keepable(weight):
        raise UsageError(
            f"{weight.name} is {weight.format}, which no packed store holds; choose another format than keep"
        )
    return Packing(weight, weight.format if kept else target)
