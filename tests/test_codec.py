"""Losslessly compressed records: what is stored, what is restored, and the errors if it differs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tierlm import LLM, Budget, CheckpointError, SamplingParams, StorageError, UsageError
from tierlm.checkpoints import codec
from tierlm.checkpoints.checkpoint import ITEM_SIZE, read_header
from tierlm.checkpoints.checksum import checksum
from tierlm.checkpoints.codec import BLOCK, compress, decompress, least_and_most, load_zstandard
from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache
from tierlm.checkpoints.hub import find_model
from tierlm.checkpoints.packed import RecordShape, file_size, in_file_order, write_file
from tierlm.checkpoints.reader import read_pieces
from tierlm.checkpoints.record import ALIGNMENT
from tierlm.checkpoints.verify import damage
from tierlm.models.catalog import Catalog
from tierlm.models.outline import work_of
from tierlm.models.packing import pack_model
from tierlm.planning.cost import decode_seconds
from tierlm.profiling.profile import machine_of
from tierlm.spec import ExpertKey, HeadKey, TrunkKey

RAM = Budget("8GiB")
FEW = SamplingParams(max_new_tokens=6)
TIGHT = {"ram_slots": 4, "resident_trunks": 0}
KEYS = [ExpertKey(2, 5), TrunkKey(0), TrunkKey(3), HeadKey(0)]
RUNS = st.lists(st.tuples(st.integers(0, BLOCK // 3), st.sampled_from([1, 2, 4, 8])), max_size=4).map(
    lambda runs: [(count * width, width) for count, width in sorted(runs, key=lambda run: -run[1])]
)


def some_bytes(runs: list[tuple[int, int]], seed: int) -> bytes:
    """Items whose last byte has few values."""
    random = np.random.default_rng(seed)
    parts = []
    for nbytes, width in runs:
        items = random.integers(0, 256, (nbytes // width, width), np.uint8)
        items[:, -1] &= np.uint8(random.integers(0, 256))
        parts.append(items.tobytes())
    return b"".join(parts)


@given(RUNS, st.integers(0, 99), st.integers(0, ALIGNMENT - 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_what_is_compressed_comes_back_in_its_own_memory(runs: list[tuple[int, int]], seed: int, spare: int) -> None:
    record = some_bytes(runs, seed)
    stored = compress(record, runs)
    out = np.empty(len(record), np.uint8)
    decompress(np.frombuffer(stored, np.uint8), out, runs)
    assert out.tobytes() == record
    if len(stored) < len(record):  # from the end of a slot, with nothing to spare
        slot = np.frombuffer(bytearray(bytes(len(record) - len(stored)) + stored + bytes(spare)), np.uint8)
        decompress(slot[len(record) - len(stored) :][: len(stored)], slot, runs)
        assert slot[: len(record)].tobytes() == record


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_damaged_raises_or_differs_and_nothing_else(seed: int) -> None:
    random = Random(seed)
    runs = [(4000, 4), (6000, 2), (999, 1)]
    record = some_bytes(runs, 1)
    stored = bytearray(compress(record, runs))
    stored[random.randrange(min(64, len(stored)) if seed % 2 else len(stored))] ^= 1 << random.randrange(8)
    del stored[len(stored) - (random.randrange(40) if seed % 3 == 0 else 0) :]
    out = np.empty(len(record), np.uint8)
    try:
        decompress(np.frombuffer(stored, np.uint8), out, runs)
    except ValueError:
        return
    assert out.tobytes() != record


def test_frames_that_announce_more_and_bytes_that_nobody_announces_are_refused() -> None:
    runs, record = [(4096, 2)], some_bytes([(4096, 2)], 3)
    stored = compress(record, runs)
    out = np.empty(len(record), np.uint8)
    with pytest.raises(ValueError, match=f"expected {len(stored)} bytes, found {len(stored) + 1}"):
        decompress(np.frombuffer(stored + b"x", np.uint8), out, runs)
    bomb = load_zstandard().compress(bytes(2**24))
    lengths = np.array([2048, len(bomb)], "<u4").tobytes()
    with pytest.raises(ValueError, match="not a plane of 2048 bytes"):
        decompress(np.frombuffer(lengths + record[:2048] + bomb, np.uint8), out, runs)


def test_a_store_is_smaller_and_its_file_is_valid(squeezed: Path, kept: Path) -> None:
    catalog, plain = Catalog(squeezed), Catalog(kept)
    for key in [*catalog.experts(), *catalog.trunks]:
        record = catalog.record(key)
        (extent,), raw = record.extents, plain.record(key).seal
        assert record.seal is not None and raw is not None
        assert extent.start % ALIGNMENT == 0 == record.nbytes % ALIGNMENT
        if record.inside is not None:
            assert record.seal.nbytes == extent.stop - extent.start < raw.nbytes
            assert record.inside.raw == raw.nbytes
            assert extent.at + extent.hi - extent.lo == record.nbytes > raw.nbytes
    experts = [catalog.record(key) for key in catalog.experts()]
    assert all(record.inside is not None for record in experts)
    assert sum(record.seal.nbytes for record in experts if record.seal) < 0.9 * sum(
        record.inside.raw for record in experts if record.inside
    )
    for name in ("resident.safetensors", "embedding.safetensors"):
        assert (squeezed / name).stat().st_size == (kept / name).stat().st_size
    for file in squeezed.glob("*.safetensors"):
        inside = {name for name, tensor in read_header(file).tensors.items() if tensor.inside is not None}
        assert load_file(file).keys() == read_header(file).tensors.keys() - inside
    assert list(damage(catalog.checkpoint, lambda done, total: None)) == []


def test_the_logits_are_the_same(squeezed: Path, kept: Path, toy_v3: tuple[Path, Any], ids: list[int]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as original:
        expected, tokens = original.logits(ids), original.generate([ids], FEW)[0].ids
    budgets = (RAM, {}), (RAM, TIGHT), (RAM, {**TIGHT, "reader": "mmap"}), (Budget("8GiB", vram="64MiB"), TIGHT)
    reads: dict[Path, list[int]] = {squeezed: [], kept: []}
    for folder, read in reads.items():
        for budget, options in budgets:
            with LLM.load(folder, budget=budget, heat=False, predictor="none", **options) as llm:
                assert torch.equal(llm.logits(ids), expected)
                assert torch.equal(llm.logits(ids), expected)
                assert llm.generate([ids], FEW)[0].ids == tokens
                links = llm.stats().links
                assert ("zstd" in links) == (folder == squeezed)
                read.append(links["disk->ram"].bytes)
    assert all(one < other for one, other in zip(reads[squeezed], reads[kept], strict=True))  # what is stored


def test_it_can_be_packed_again(squeezed: Path, kept: Path, tmp_path: Path) -> None:
    for origin, formats, zstd in ((squeezed, "keep", "zstd"), (squeezed, "keep", "none"), (squeezed, "int4", "none")):
        out, reference = tmp_path / f"{formats}-{zstd}", tmp_path / f"of-kept-{formats}-{zstd}"
        pack_model(origin, out, experts=formats, trunk="keep", codec=zstd)
        pack_model(kept, reference, experts=formats, trunk="keep", codec=zstd)
        one, other = Catalog(out), Catalog(reference)
        for key in [*one.trunks, *one.experts()]:
            assert one.record(key).seal.checksum == other.record(key).seal.checksum  # type: ignore[union-attr]


def test_interrupted_it_goes_on(
    squeezed: Path, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = codec.compress, [70]

    def stopping(*arguments: Any) -> bytes:
        left[0] -= 1
        if not left[0] % 25:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("tierlm.checkpoints.packed.compress", stopping)
    out, stops = tmp_path / "out", 0
    while not out.exists():
        try:
            pack_model(toy_v3[0], out, experts="keep", trunk="keep", codec="zstd")
        except KeyboardInterrupt:
            stops += 1
    assert stops > 1
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in squeezed.iterdir()
    }


def reseal(file: Path, stored: bytearray, old: str, at: int) -> None:
    """Overwrite the record at ``at``, whose checksum was ``old``, and its checksum."""
    content = bytearray(file.read_bytes())
    content[at : at + len(stored)] = stored
    file.write_bytes(content.replace(old.encode(), checksum(bytes(stored)).encode()))


@pytest.mark.parametrize("what", ["length", "frame", "record"])
def test_what_was_packed_wrongly_is_named(what: str, squeezed: Path, tmp_path: Path, ids: list[int]) -> None:
    """The checksum is right, but the bytes are no record, or another one."""
    folder = tmp_path / "copy"
    shutil.copytree(squeezed, folder)
    record = Catalog(folder).record(ExpertKey(2, 5))
    seal, inside = record.seal, record.inside
    assert seal is not None and inside is not None
    stored = bytearray(seal.file.read_bytes()[seal.offset :][: seal.nbytes])
    if what == "record":
        reseal(seal.file, bytearray(), inside.checksum, 0)
    else:
        lengths = np.frombuffer(stored[: least_and_most(inside.runs)[0]], "<u4")
        (packed, *_) = np.flatnonzero(lengths < lengths.max())  # a plane that is compressed
        stored[4 * packed if what == "length" else 4 * len(lengths) + lengths[:packed].sum()] ^= 1
        reseal(seal.file, stored, seal.checksum, seal.offset)
    place = f"{seal.file}.*expert 5 of layer 2.*offset {seal.offset}: "
    with LLM.load(folder, budget=RAM, heat=False, predictor="none", **TIGHT) as llm:
        for _ in range(2):  # and again the next time
            with pytest.raises(StorageError, match=f"{place}.*pack the model again") as raised:
                llm.logits(ids)
            assert (raised.value.file, raised.value.offset) == (str(seal.file), seal.offset)
    (found,) = damage(Catalog(folder).checkpoint, lambda done, total: None)
    assert re.search(f"{place}zstd: ", str(found))
    with pytest.raises(StorageError, match=f"{seal.file}.*zstd: "):
        pack_model(folder, tmp_path / "out", experts="keep", trunk="keep")


def test_what_is_refused(toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no record contains only floats"):
        pack_model(toy_v3[0], tmp_path / "out", experts="int4", trunk="int8", codec="zstd")
    with pytest.raises(UsageError, match="expected one of none, zstd, auto, found 'lz4'"):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep", codec="lz4")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match=r"pip install tierlm\[zstd\]"):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep", codec="zstd")
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_decompressed_here_is_told_at_the_start(
    squeezed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match=r"pip install tierlm\[zstd\]"):
        LLM.load(squeezed, budget=RAM, **TIGHT)


@pytest.mark.parametrize("formats", ["bf16", "f16", "fp8"])
def test_every_format_of_floats_comes_back_bit_by_bit(
    formats: str, toy_v3: tuple[Path, Any], tmp_path: Path, ids: list[int]
) -> None:
    found: dict[str, list[Any]] = {}
    for name in ("none", "zstd"):
        out = tmp_path / name
        pack_model(toy_v3[0], out, experts=formats, trunk=formats, codec=name)
        assert all((record.inside is not None) == (name == "zstd") for record in map(Catalog(out).record, KEYS))
        with LLM.load(out, budget=RAM, heat=False, **TIGHT) as llm:
            found[name] = [llm.logits(ids), llm.generate([ids], FEW)[0].ids]
        pack_model(out, tmp_path / f"{name}-again", experts="keep", trunk="keep")
    assert torch.equal(found["zstd"][0], found["none"][0]) and found["zstd"][1] == found["none"][1]
    for file in (tmp_path / "none-again").glob("*.safetensors"):
        data = file.read_bytes()[read_header(file).begin :]
        other = tmp_path / "zstd-again" / file.name
        assert other.read_bytes()[read_header(other).begin :] == data


def test_trained_weights_take_less_room() -> None:
    catalog = Catalog(find_model("demo"))
    for key in catalog.experts()[::50]:
        tensors = [tensor for extent in catalog.record(key).extents for tensor in extent.tensors]
        record = b"".join(b"".join(read_pieces(tensor)) for tensor in tensors)
        runs = [(tensor.nbytes, ITEM_SIZE[tensor.dtype]) for tensor in tensors]
        stored = compress(record, runs)
        assert len(stored) < 0.75 * len(record)
        out = np.empty(len(record), np.uint8)
        decompress(np.frombuffer(stored, np.uint8), out, runs)
        assert out.tobytes() == record


@pytest.mark.parametrize(("speed", "codec"), [(1e3, "zstd"), (1e15, "none"), (None, "none")])
def test_auto_compresses_for_slow_disks(
    speed: float | None, codec: str, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if speed is not None:
        ProfileCache(tmp_path / "cache" / "tierlm").put(tmp_path, DiskProfile(2**23, 8, speed, 1e-3))
    said: list[str] = []
    settings = {"experts": "keep", "trunk": "keep", "codec": "auto"}
    pack_model(toy_v3[0], tmp_path / "out", **settings, say=said.append)  # type: ignore[arg-type]
    assert said[0].startswith(f"codec {codec}: ")
    words = "is unknown" if speed is None else r"\d+% of the bytes remain; 8 threads decompress .* GB/s, .* deliver"
    assert re.search(words, said[0])
    assert Catalog(tmp_path / "out").compressed == (codec == "zstd")
    assert json.loads((tmp_path / "out" / "tierlm.json").read_text())["packed"].get("codec", "none") == codec


def test_auto_goes_on_with_what_was_begun(
    squeezed: Path, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(codec: str, progress: Any = None) -> None:
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep", codec=codec, progress=progress)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack("zstd", stop)
    with pytest.raises(UsageError, match="of other settings"):
        pack("none")
    pack("auto")
    assert Catalog(tmp_path / "out").fingerprint == Catalog(squeezed).fingerprint


def test_auto_leaves_integers(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    said: list[str] = []
    pack_model(toy_v3[0], tmp_path / "out", experts="int4", trunk="int8", codec="auto", say=said.append)
    assert said == ["codec none: no record contains only floats"]


def test_the_plan_reads_less_and_holds_the_same(squeezed: Path, kept: Path) -> None:
    small, plain = work_of(Catalog(squeezed)), work_of(Catalog(kept))
    assert plain.stored == (1.0, 1.0)
    assert 0.5 < small.stored[0] < 0.95 and 0.5 < small.stored[1] < 0.95
    rates = machine_of(None, False), (0.5, 0.5), (1000, 0), 10
    assert small.expert_bytes >= plain.expert_bytes
    read = [decode_seconds(work, *rates).disk_bytes for work in (small, plain)]
    missed = small.moe_layers * small.experts_per_token / 2
    assert read[0] == pytest.approx(missed * small.expert_bytes * small.stored[0] + 1000 * small.stored[1])
    assert read[1] == missed * plain.expert_bytes + 1000


def test_integers_stay_as_they_are(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    pack_model(toy_v3[0], tmp_path / "out", experts="int8", trunk="keep", codec="zstd")
    catalog = Catalog(tmp_path / "out")
    assert all(catalog.record(key).inside is None for key in catalog.experts())
    assert all(catalog.record(key).inside is not None for key in catalog.layers)


def lie(dtype: str, shape: list[Any], name: str = "a", outer: str = "tierlm.zstd.0", seal: Any = "") -> str:
    return json.dumps({outer: [seal, {name: [dtype, shape]}]})


LIES = [
    "[",
    "[1]",
    '{"x": {}}',
    '{"tierlm.zstd.0": ["", {}]}',
    '{"tierlm.zstd.0": ["", {"a": 5}]}',
    '{"tierlm.zstd.0": {"a": ["BF16", [200]]}}',
    lie("BF16", [-4]),
    lie("BF16", ["4"]),
    lie("Q4", [9999]),
    lie("BF16", [1]),  # fewer bytes than there are
    lie("BF16", [2**60]),  # more bytes than possible
    lie("BF16", [200], name="tierlm.zstd.0"),
    lie("BF16", [200], outer="other"),
    lie("BF16", [200], seal=7),
]


def test_what_is_no_lie(tmp_path: Path) -> None:
    assert read_header(lying(tmp_path, lie("BF16", [200]))).tensors["a"].shape == (200,)


@pytest.mark.parametrize("text", LIES)
def test_what_the_header_claims_is_checked(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tierlm\.zstd is malformed"):
        read_header(lying(tmp_path, text))


def lying(folder: Path, text: str) -> Path:
    header = json.dumps({
        "__metadata__": {"tierlm.zstd": text},
        "tierlm.zstd.0": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]},
    }).encode()  # fmt: skip
    header = header.ljust(ALIGNMENT - 8)
    file = folder / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    return file


def test_what_gains_nothing_is_stored_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    data = {"noise": Random(1).randbytes(5000), "zeros": bytes(6000)}
    shapes = [
        RecordShape(name, in_file_order({name: ("BF16", (len(each) // 2,))}), True) for name, each in data.items()
    ]
    write_file(file, shapes, {}, (memoryview(each) for each in data.values()))
    assert file.stat().st_size < file_size(shapes, {})
    header = read_header(file)
    noise, zeros = (header.tensors[name].inside for name in data)
    assert noise is not None and noise.nbytes == len(data["noise"]) + 8  # and the lengths of two planes
    assert zeros is not None and zeros.nbytes < 100
    assert {name: b"".join(read_pieces(header.tensors[name])) for name in data} == data
    assert header.tensors["noise"].offset % ITEM_SIZE["BF16"] == 0
