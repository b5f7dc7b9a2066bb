"""What a packed store of a model consists of: its records, by file, and the format that each weight is to have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from tierlm.checkpoints.checksum import ALGORITHM
from tierlm.checkpoints.codec import load_zstandard, measure
from tierlm.checkpoints.disk_profile import ProfileCache, disk_name
from tierlm.checkpoints.pack import PackedRecord, Packing, Progress, pack, raw_bytes, unfinished
from tierlm.checkpoints.packed import VERSION
from tierlm.checkpoints.probe import find_profile
from tierlm.checkpoints.reader import open_reader
from tierlm.checkpoints.rows import block_of_rows
from tierlm.checkpoints.stored import StoredWeight
from tierlm.errors import UsageError
from tierlm.files import user_cache
from tierlm.formats import FORMATS
from tierlm.formats.tiles import GROUP, LANES
from tierlm.models.catalog import Catalog
from tierlm.spec import ExpertKey, ResidentKey

KEEP = "keep"
CODECS = ("none", "zstd", "auto")
PLAIN = ("embedding.safetensors", "resident.safetensors")  # never compressed: read row by row, and small
SAMPLES = 4  # records that are compressed to learn how fast they come back
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


def pack_model(
    folder: Path,
    out: Path,
    *,
    experts: str,
    trunk: str,
    codec: str = "none",
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the model of ``folder`` as a packed store to ``out``, a new folder.

    ``experts``, ``trunk``: the formats of the routed experts' matrices, and of those that every token uses, by name, or
    "keep". Norms, routers and the embedding stay as they are; layers for multi-token prediction are left out.
    ``codec``: "zstd" compresses the records of floats, "none" none; "auto" is the one that ``choose_codec`` finds.
    ``say`` is called with what became of the codec, in words. Raises UsageError, CheckpointError, StorageError.
    """
    if codec not in CODECS:
        raise UsageError(f"codec: expected one of {', '.join(CODECS)}, found {codec!r}")
    for what, name in (("experts", experts), ("trunk", trunk)):
        known = [KEEP, *(format.name for format in FORMATS.values() if format.loadable)]
        if name not in known:
            raise UsageError(f"{what}: expected one of {', '.join(known)}, found {name!r}")
    if folder.resolve() in out.resolve().parents:
        raise UsageError(f"{out}: lies in the folder of the model, in which nothing is written; choose another")
    catalog = Catalog(folder)
    files = records_of(catalog, experts, trunk)
    if codec == "auto":
        codec, why = choose_codec(catalog, files, out)
        if say is not None:
            say(f"codec {codec}: {why}")
    if codec == "zstd":
        load_zstandard()  # or say now that it is missing
        files = compressed(files)
        count, total = len(_compressed_records(files)), sum(map(len, files.values()))
        if not count:
            raise UsageError(
                "codec zstd: no record is of floats alone; int8 and int4 would gain little, and never are: "
                "choose other formats (--experts keep --trunk keep), or codec none"
            )
        if say is not None:
            say(f"codec zstd: {count} of {total} records are compressed")
    beside = {
        file.name: file.read_bytes() for pattern in BESIDE for file in sorted(folder.glob(pattern)) if file.is_file()
    }
    config = json.loads(beside["config.json"])
    packings = (packing for records in files.values() for record in records for packing in record.packings)
    if "quantization_config" in config and any(packing.target != packing.weight.format for packing in packings):
        del config["quantization_config"]  # it speaks of a format that not all weights have any more
        beside["config.json"] = json.dumps(config, indent=2).encode()
    pack(files, beside, out, describe(catalog, experts, trunk, codec), progress)


def records_of(catalog: Catalog, experts: str, trunk: str) -> dict[str, list[PackedRecord]]:
    """The files of the packed store, name -> records: one for each layer, and three for what is no layer's."""
    spec, family = catalog.spec, catalog.family

    def record(name: str, weights: Mapping[str, tuple[str, tuple[int, ...]]], target: str) -> PackedRecord:
        return PackedRecord(name, [_packing(catalog.stored(*weight), target) for weight in weights.values()])

    embedding = catalog.stored(family.embedding_name(), (spec.vocab, spec.hidden))
    files = {
        "embedding.safetensors": [
            PackedRecord("embedding", [_packing(embedding, KEEP)], block=block_of_rows(catalog.embedding))
        ],
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
    """The same files, in which the records that are of floats alone are compressed: experts, trunks, the lm_head."""
    return {
        name: [replace(record, compress=name not in PLAIN and record.floats) for record in records]
        for name, records in files.items()
    }


def choose_codec(catalog: Catalog, files: Mapping[str, Sequence[PackedRecord]], out: Path) -> tuple[str, str]:
    """The codec for ``files`` on the disk of ``out``, and why, in words: zstd where as many threads as the disk is read
    with make records again as fast as it would deliver them compressed. What was begun with a codec goes on with it.
    """
    if (description := unfinished(out)) is not None:
        return description["packed"].get("codec", "none"), "as the unfinished pack was begun"
    records = sorted(_compressed_records(compressed(files)), key=lambda record: record.shape().nbytes)
    if not records:
        return "none", "no record is of floats alone"
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    cache = ProfileCache(user_cache())
    profile, name = cache.get(folder), disk_name(folder)
    if profile is None and folder.stat().st_dev == catalog.files[0].stat().st_dev:
        reader, _ = open_reader("auto", catalog.files)
        with closing(reader):
            profile, _ = find_profile(reader, catalog.files, "auto", cache)
    if profile is None or profile.bytes_per_second is None:
        return "none", f"the speed of {name} is not known; running a model of a GiB or more from it measures it"
    middle = len(records) // 2  # an expert, where there are any
    share, speed = measure([raw_bytes(record) for record in records[middle : middle + SAMPLES]], profile.depth)
    wanted = profile.bytes_per_second / share
    found = f"{share:.0%} of the bytes are left; {profile.depth} threads decompress {speed / 1e9:.2f} GB/s, {name}"
    return "zstd" if speed >= wanted else "none", f"{found} would deliver {wanted / 1e9:.2f} GB/s so compressed"


def _compressed_records(files: Mapping[str, Sequence[PackedRecord]]) -> list[PackedRecord]:
    return [record for records in files.values() for record in records if record.compress]


def describe(catalog: Catalog, experts: str, trunk: str, codec: str) -> dict[str, Any]:
    """The settings of a pack, and which files it was made from."""
    files = {}
    for file, header in catalog.checkpoint.headers.items():
        status = file.stat()
        with open(file, "rb") as stream:
            digest = xxhash.xxh3_64_hexdigest(stream.read(header.begin))
        files[file.name] = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "header_xxh3_64": digest}
    source = {"name": catalog.checkpoint.folder.resolve().name, "fingerprint": catalog.fingerprint, "files": files}
    packed = {"experts": experts, "trunk": trunk, "tile": [LANES, GROUP], "checksum": ALGORITHM}
    if codec != "none":
        packed["codec"] = codec
    return {"version": VERSION, "packed": packed, "source": source}


def _packing(weight: StoredWeight, target: str) -> Packing:
    """A weight that has the format already, and a vector, stay as they are."""
    kept = target == KEEP or len(weight.shape) != 2
    return Packing(weight, weight.format if kept else target)
