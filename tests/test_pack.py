"""Packed stores: their contents, that they are written completely or not at all, and that damage is found and named."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from full_disk import FullDisk
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tierlm import LLM, Budget, BudgetError, CheckpointError, StorageError, UsageError, files
from tierlm.checkpoints import pack, packed
from tierlm.checkpoints.ahead import ahead
from tierlm.checkpoints.checkpoint import ITEM_SIZE, Checkpoint, read_header
from tierlm.checkpoints.packed import PADDING, RecordShape, in_file_order, read_seals, write_file
from tierlm.checkpoints.reader import read_pieces
from tierlm.checkpoints.record import ALIGNMENT, TensorInfo
from tierlm.checkpoints.stored import StoredWeight
from tierlm.checkpoints.verify import damage
from tierlm.checkpoints.views import Weights, weights_of
from tierlm.kernels import quantise, widen
from tierlm.models import packing
from tierlm.models.catalog import Catalog
from tierlm.models.packing import pack_model
from tierlm.spec import ExpertKey, HeadKey, Key, ResidentKey, TrunkKey

RAM = Budget("8GiB")
TIGHT = {"ram_slots": 4, "resident_trunks": 0}
DAMAGED = ExpertKey(2, 5)  # an expert that the prompt uses


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def flip(file: Path, at: int) -> None:
    """Damage one byte; a second call repairs it."""
    with open(file, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


# --- contents of a packed store


def test_a_lossless_store_has_the_tensors_of_its_source(kept: Path, toy_v3: tuple[Path, Any]) -> None:
    source = load_file(toy_v3[0] / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in kept.glob("*.safetensors"):
        found |= {name: tensor for name, tensor in load_file(file).items() if not name.startswith(PADDING)}
    assert torch.equal(found.pop("lm_head.weight.rows.0.131"), source.pop("lm_head.weight"))
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_each_record_is_one_aligned_sealed_read(kept: Path) -> None:
    catalog = Catalog(kept)
    for key in [ResidentKey(), *catalog.trunks, *catalog.experts()]:
        record = catalog.record(key)
        (extent,) = record.extents
        assert extent.start % ALIGNMENT == 0
        assert record.seal is not None and record.seal.offset == extent.start
        for place in record.places.values():
            assert place.offset % ITEM_SIZE[place.dtype] == 0
    assert catalog.sealed
    assert catalog.head == [HeadKey(0)]


def test_a_lossless_store_gives_the_same_logits(kept: Path, toy_v3: tuple[Path, Any], ids: list[int]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as original:
        expected = original.logits(ids)
    for options in ({}, TIGHT, {**TIGHT, "reader": "mmap", "transfer_threads": 3}):
        with LLM.load(kept, budget=RAM, **options) as llm:
            assert torch.equal(llm.logits(ids), expected)
            assert torch.equal(llm.logits(ids), expected)
            assert llm.stats().links["checksum"].bytes > 0


def test_records_are_compared_with_their_seals_once(kept: Path, ids: list[int]) -> None:
    with LLM.load(kept, budget=RAM, **TIGHT) as llm:
        llm.logits(ids)
        llm.logits(ids)
        once = llm.stats().links
        llm.logits(ids)
        again = llm.stats().links
    assert again["checksum"].bytes == once["checksum"].bytes
    assert again["disk->ram"].bytes > once["disk->ram"].bytes


def test_what_is_beside_the_weights_comes_along(kept: Path, toy_v3: tuple[Path, Any]) -> None:
    assert (kept / "config.json").read_bytes() == (toy_v3[0] / "config.json").read_bytes()
    description = json.loads((kept / "tierlm.json").read_text())
    assert description["packed"]["experts"] == "keep"
    assert description["source"]["files"]["model.safetensors"]["bytes"] == (
        (toy_v3[0] / "model.safetensors").stat().st_size
    )


def test_exact_activations_are_an_option_that_acts(toy_v3: tuple[Path, Any], tmp_path: Path, ids: list[int]) -> None:
    """tests/test_quantised.py measures the gain."""
    pack_model(toy_v3[0], tmp_path / "out", experts="int8", trunk="int8")

    def logits(**options: Any) -> torch.Tensor:
        with LLM.load(tmp_path / "out", budget=RAM, heat=False, **options) as llm:
            return llm.logits(ids)

    exact = logits(exact=True)
    assert not torch.equal(exact, logits())
    assert torch.equal(exact, logits(exact=True, **TIGHT))


def test_a_packed_store_can_be_packed_again(kept: Path, tmp_path: Path) -> None:
    pack_model(kept, tmp_path / "again", experts="keep", trunk="keep")
    for name, data in contents(kept).items():
        if name != "tierlm.json" and not name.endswith(".safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == data
    first, second = Catalog(kept), Catalog(tmp_path / "again")
    assert all(
        first.record(key).seal.checksum == second.record(key).seal.checksum  # type: ignore[union-attr]
        for key in [*first.trunks, *first.experts()]
    )


def weights(folder: Path, key: Key) -> Weights:
    """The weights of one record, as a run sees them."""
    record = Catalog(folder).record(key)
    data = torch.zeros(record.nbytes, dtype=torch.uint8)
    for extent in record.extents:
        part = extent.file.read_bytes()[extent.lo : extent.stop]
        data[extent.at : extent.at + len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
    return weights_of(data, record)


@pytest.mark.parametrize("target", ["bf16", "int8", "int4"])
def test_fp8_is_kept_and_becomes_others_by_way_of_float32(
    target: str, toy_v3: tuple[Path, Any], tmp_path: Path
) -> None:
    source = tmp_path / "fp8"
    pack_model(toy_v3[0], source, experts="fp8", trunk="fp8")
    pack_model(source, tmp_path / "kept", experts="fp8", trunk="keep")
    pack_model(source, tmp_path / "made", experts=target, trunk=target)
    for key in (ExpertKey(3, 7), TrunkKey(0), HeadKey(0)):
        kept, made = weights(tmp_path / "kept", key), weights(tmp_path / "made", key)
        for role, weight in weights(source, key).items():
            if weight.data.dim() == 1:
                assert torch.equal(kept[role].data, weight.data) and torch.equal(made[role].data, weight.data)
                continue
            assert kept[role].format == "fp8" and made[role].format == target
            assert torch.equal(widen(kept[role]), widen(weight))
            assert torch.equal(widen(made[role]), widen(quantise(widen(weight), target)))
            assert made[role].shape == weight.shape


def test_the_config_speaks_of_float8_where_all_of_it_was_kept(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    source = tmp_path / "fp8"
    pack_model(toy_v3[0], source, experts="fp8", trunk="fp8")
    config = json.loads((source / "config.json").read_text())
    stated = json.dumps({**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    (source / "config.json").write_text(stated)
    for experts, trunk, expected in (("keep", "fp8", stated), ("keep", "bf16", None), ("int4", "keep", None)):
        out = tmp_path / f"{experts}-{trunk}"
        pack_model(source, out, experts=experts, trunk=trunk)
        found = (out / "config.json").read_text()
        assert found == expected if expected else json.loads(found) == config
        assert Catalog(out).spec == Catalog(source).spec
    assert (source / "config.json").read_text() == stated


SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
RECORDS = st.lists(st.lists(st.tuples(st.sampled_from(sorted(ITEM_SIZE)), SHAPES), max_size=4), max_size=5)


@given(RECORDS, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_records_make_a_file_that_is_valid_and_sealed(tmp_path_factory: Any, records: Any, seed: int) -> None:
    random = Random(seed)
    file = tmp_path_factory.mktemp("file") / "x.safetensors"
    shapes = [
        RecordShape(f"record {i}", in_file_order({f"{i}.{j}": tensor for j, tensor in enumerate(tensors)}))
        for i, tensors in enumerate(records)
    ]
    data = [random.randbytes(shape.nbytes) for shape in shapes]
    write_file(file, shapes, {"note": "x"}, (memoryview(each) for each in data))
    assert file.stat().st_size == packed.file_size(shapes, {"note": "x"})
    header = read_header(file)
    seals = {seal.name: seal for seal in read_seals(file, header).values() if seal.nbytes}
    content = file.read_bytes()
    for shape, each in zip(shapes, data, strict=True):
        if each:
            seal = seals[shape.name]
            assert seal.offset % ALIGNMENT == 0
            assert content[seal.offset : seal.offset + seal.nbytes] == each
        for name, (dtype, tensor_shape) in shape.tensors.items():
            tensor = header.tensors[name]
            assert (tensor.dtype, tensor.shape) == (dtype, tensor_shape)
            assert tensor.offset % ITEM_SIZE[dtype] == 0
    assert load_file(file).keys() == header.tensors.keys()
    assert list(damage(Checkpoint(file.parent), lambda done, total: None)) == []


# --- memory


def test_memory_is_checked_first_and_sets_how_much_is_queued(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "process_ram", lambda: 2**28)  # FAKE: it grows from call to call
    catalog, formats = Catalog(toy_v3[0]), {"experts": "int8", "trunk": "keep"}
    floor = packing.least_memory(catalog, **formats, process=2**28)
    with pytest.raises(BudgetError, match=r"ram budget of .* is below the .* that packing needs") as caught:
        pack_model(toy_v3[0], tmp_path / "out", **formats, ram=floor - 1)
    assert (caught.value.floor, caught.value.given) == (floor, floor - 1)
    assert not list(tmp_path.iterdir())
    files = packing.records_of(catalog, **formats)
    needs = [pack.memory_of(files, queued) for queued in range(1, pack.AHEAD + 1)]
    assert needs == sorted(set(needs))
    assert packing._queued(files, floor) == 1
    assert packing._queued(files, floor - needs[0] + needs[2]) == 3
    assert packing._queued(files, 2**40) == pack.AHEAD
    for name, ram in (("least", floor), ("most", 2**40)):
        pack_model(toy_v3[0], tmp_path / name, **formats, ram=ram)
    assert contents(tmp_path / "least") == contents(tmp_path / "most")


def test_no_more_is_held_than_the_plan_says(tmp_path: Path) -> None:
    """What numpy and Python hold, not torch: pieces and stored matrices, of a file that is all one matrix."""
    file, size = tmp_path / "f", 40 * 2**20
    file.write_bytes(bytes(size))
    part = TensorInfo("w", file, 0, size, "U8", (size,))
    weight = StoredWeight("w", (size,), "f32", {"": part})
    record = pack.PackedRecord("w", [pack.Packing(weight, "f32")])
    tracemalloc.start()
    for chunk in ahead(pack.converted(ahead(pack.read_records([record]), 2)), 2):
        assert chunk.nbytes
    assert tracemalloc.get_traced_memory()[1] <= pack.memory_of({"f": [record]}, 2)
    tracemalloc.stop()


# --- completely, or not at all

KILLS = """
import os, random, signal, sys
from pathlib import Path
import torch
from tierlm.models.packing import pack_model
from tierlm.checkpoints import pack

torch.set_num_threads(1)
source, out = Path(sys.argv[1]), Path(sys.argv[2])
random.seed(5)
real = pack.write_file
for _ in range(10):
    left = random.randrange(1, 60)

    def counted(chunks):
        global left
        for chunk in chunks:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            yield chunk

    def write_file(file, records, metadata, chunks):
        real(file, records, metadata, counted(chunks))

    child = os.fork()
    if child == 0:
        pack.write_file = write_file
        pack_model(source, out, experts="bf16", trunk="keep")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not out.exists()
print(len(list(Path(f"{out}.unfinished").glob("*.safetensors"))))
pack_model(source, out, experts="bf16", trunk="keep")
"""


def test_killed_at_ten_points_and_resumed_it_is_the_same(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pack_model(toy_v3[0], whole, experts="bf16", trunk="keep")
    command = [sys.executable, "-c", KILLS, str(toy_v3[0]), str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 7  # killed packs finished some files, but not all
    assert contents(broken) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


LAST_STEP = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from tierlm import files
from tierlm.checkpoints import pack
from tierlm.models.packing import pack_model

real = pack.whole

@contextmanager
def killed(file):
    with real(file) as stream:
        stream.write(b"half")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        yield stream

for nameless in (files._nameless, lambda folder: None):
    if os.fork() == 0:
        files._nameless, pack.whole = nameless, killed
        pack_model(Path(sys.argv[1]), Path(sys.argv[2]), experts="keep", trunk="keep")
    os.wait()
    print(len(list(Path(f"{sys.argv[2]}.unfinished").glob(".*"))))
pack_model(Path(sys.argv[1]), Path(sys.argv[2]), experts="keep", trunk="keep")
"""


def test_killed_in_its_last_step_it_leaves_no_stray_file(kept: Path, toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    """On a file system with nameless files, and on one without, where the next run removes what is left."""
    command = [sys.executable, "-c", LAST_STEP, str(toy_v3[0]), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]
    assert contents(tmp_path / "out") == contents(kept)


def test_what_is_finished_is_not_written_again(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = write_file

    def stop_at_the_fourth(file: Path, *rest: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file.name)
        real(file, *rest)

    monkeypatch.setattr("tierlm.checkpoints.pack.write_file", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")
    first, written = written, []
    with pytest.raises(KeyboardInterrupt):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")
    assert len(first) == len(written) == 3 and not set(first) & set(written)


@pytest.mark.parametrize("room", [0, 5_000, 200_000, 600_000])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    room: int, kept: Path, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(files, "open", FullDisk(room).open, raising=False)
    with pytest.raises(StorageError, match=r"cannot be written: No space left on device.*same command"):
        pack_model(toy_v3[0], out, experts="keep", trunk="keep")
    assert not out.exists()
    for file in (tmp_path / "out.unfinished").glob("*"):
        assert file.read_bytes() == (kept / file.name).read_bytes()  # finished, or not there
    monkeypatch.undo()
    pack_model(toy_v3[0], out, experts="keep", trunk="keep")
    assert contents(out) == contents(kept)


def test_too_little_room_is_told_before_anything_is_written(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 65 * 2**20}))
    with pytest.raises(StorageError, match=r"out: needs .* its disk has 65\.00 MiB free"):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_named_and_what_is_finished_is_kept(
    kept: Path, toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage that fails works ahead of the writing."""
    real = read_pieces

    def failing(tensor: TensorInfo) -> Iterator[memoryview]:
        if tensor.name == "model.layers.2.mlp.experts.3.up_proj.weight":
            raise StorageError("made to fail")
        return real(tensor)

    monkeypatch.setattr("tierlm.checkpoints.pack.read_pieces", failing)
    with pytest.raises(StorageError, match="made to fail"):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")
    finished = sorted(file.name for file in (tmp_path / "out.unfinished").glob("*.safetensors*"))
    assert finished == [
        "embedding.safetensors",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "resident.safetensors",
    ]
    monkeypatch.undo()
    pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")
    assert contents(tmp_path / "out") == contents(kept)


@given(st.integers(0, 8), st.integers(1, 4), st.integers(0, 9), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_made_ahead_is_the_same_and_never_more_than_that(
    count: int, limit: int, asked: int, fails: bool
) -> None:
    made: list[int] = []
    closed: list[bool] = []

    def items() -> Generator[int, None, None]:
        try:
            for i in range(count):
                made.append(i)
                yield i
            if fails:
                raise ValueError("made to fail")
        finally:
            closed.append(True)

    found: list[int] = []
    with closing(ahead(items(), limit)) as stream, suppress(ValueError):
        for _ in range(asked):
            found += islice(stream, 1)
            assert len(made) <= len(found) + limit
        if asked <= count:
            assert found == list(range(asked))
        else:
            assert not fails and found == list(range(count))
    assert found == list(range(min(asked, count)))
    assert closed == [True] * bool(asked)


def test_what_exists_is_never_written_to(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        pack_model(toy_v3[0], tmp_path, experts="keep", trunk="keep")
    with pytest.raises(UsageError, match="is inside the model's folder"):
        pack_model(toy_v3[0], toy_v3[0] / "packed", experts="keep", trunk="keep")
    with pytest.raises(UsageError, match=r"expected one of keep, .*int4"):
        pack_model(toy_v3[0], tmp_path / "out", experts="int3", trunk="keep")
    assert not list(tmp_path.iterdir())


def test_an_unfinished_pack_of_something_else_is_left_alone(
    toy_v3: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "open", FullDisk(200_000).open, raising=False)
    with pytest.raises(StorageError):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")
    monkeypatch.undo()
    before = contents(tmp_path / "out.unfinished")
    with pytest.raises(UsageError, match="an unfinished pack of another model, of other settings"):
        pack_model(toy_v3[0], tmp_path / "out", experts="bf16", trunk="keep")
    assert contents(tmp_path / "out.unfinished") == before


def test_two_packs_do_not_write_to_one_folder(toy_v3: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another pack is writing"):
        pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")
    os.close(held)
    pack_model(toy_v3[0], tmp_path / "out", experts="keep", trunk="keep")


# --- damage


def test_verify_finds_nothing_wrong(kept: Path, toy_v3: tuple[Path, Any]) -> None:
    for folder in (kept, toy_v3[0]):
        seen: list[tuple[int, int]] = []
        assert list(damage(Catalog(folder).checkpoint, lambda *at, seen=seen: seen.append(at))) == []
        assert seen[-1][0] == seen[-1][1] > 0


@pytest.fixture
def copy(toy_v3: tuple[Path, Any], tmp_path: Path) -> Path:
    pack_model(toy_v3[0], tmp_path / "copy", experts="keep", trunk="keep")
    return tmp_path / "copy"


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_byte_is_named_by_verify_and_by_run(
    where: float, codec: str, toy_v3: tuple[Path, Any], tmp_path: Path, ids: list[int]
) -> None:
    copy = tmp_path / "copy"
    pack_model(toy_v3[0], copy, experts="keep", trunk="keep", codec=codec)
    seal = Catalog(copy).record(DAMAGED).seal
    assert seal is not None
    with LLM.load(copy, budget=RAM, heat=False, predictor="none", **TIGHT) as llm:
        flip(seal.file, seal.offset + int(where * (seal.nbytes - 1)))
        (found,) = damage(Catalog(copy).checkpoint, lambda done, total: None)
        with pytest.raises(StorageError) as raised:
            llm.logits(ids)
        for error in (found, raised.value):
            assert (error.file, error.tensor, error.offset) == (str(seal.file), "expert 5 of layer 2", seal.offset)
            assert f"offset {seal.offset}: expected xxh3_64 {seal.checksum}, found " in str(error)
        flip(seal.file, seal.offset + int(where * (seal.nbytes - 1)))
        assert llm.logits(ids).isfinite().all()  # a failed record is read again


def test_a_damaged_copy_is_named_and_another_one_is_read(copy: Path, tmp_path: Path, ids: list[int]) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for file in copy.glob("*.safetensors"):
        shutil.copy(file, mirror)
    seal = Catalog(copy).record(DAMAGED).seal
    assert seal is not None
    options = {"heat": False, "predictor": "none", "mirrors": (str(mirror),), **TIGHT}
    with LLM.load(copy, budget=RAM, **options) as llm:
        expected = llm.logits(ids)
    for damaged in (seal.file, mirror / seal.file.name):
        flip(damaged, seal.offset)
        with LLM.load(copy, budget=RAM, **options) as llm:
            for _ in range(3):  # whichever copy is read
                assert torch.equal(llm.logits(ids), expected)
            failed = [note for note in llm.stats().notes if "a copy failed" in note]
            assert all(f"{damaged}: expert 5 of layer 2" in note for note in failed)
            assert failed or damaged != seal.file  # of two copies on one disk, the first is read
        flip(damaged, seal.offset)
    flip(seal.file, seal.offset)
    flip(mirror / seal.file.name, seal.offset)
    with LLM.load(copy, budget=RAM, **options) as llm, pytest.raises(StorageError) as raised:
        llm.logits(ids)
    assert all(f"{folder / seal.file.name}: expert 5 of layer 2" in str(raised.value) for folder in (copy, mirror))


def test_damage_to_a_trunk_and_to_the_gates_stops_the_start(copy: Path) -> None:
    catalog = Catalog(copy)
    for key, name in (
        (TrunkKey(1), "trunk of layer 1"),
        (ResidentKey(), "resident tensors"),
        (HeadKey(0), "block 0 of the lm_head"),
    ):
        seal = catalog.record(key).seal
        assert seal is not None
        flip(seal.file, seal.offset + 7)
        with pytest.raises(StorageError, match=f"{name}, .* expected xxh3_64"):
            LLM.load(copy, budget=RAM)
        flip(seal.file, seal.offset + 7)


def test_rows_of_the_embedding_are_compared_when_they_are_first_read(
    copy: Path, toy_v3: tuple[Path, Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks. Damage in unread blocks is reported only by verify."""
    monkeypatch.setattr("tierlm.checkpoints.rows.BLOCK", 1000)  # five rows of 192 bytes
    shutil.rmtree(copy)
    pack_model(toy_v3[0], copy, experts="keep", trunk="keep")
    catalog = Catalog(copy)
    table = catalog.embedding
    assert [seal.nbytes for seal in catalog.seals_of(table)] == [960] * 26 + [192]
    unused = max(set(range(130)) - {row for row in range(130) for i in ids if row // 5 == i // 5})
    flip(table.file, table.offset + unused * 192)
    with LLM.load(copy, budget=RAM, heat=False, **TIGHT) as llm:
        expected = llm.logits(ids)
        flip(table.file, table.offset + ids[3] * 192 + 100)  # checked before
        assert not torch.equal(llm.logits(ids), expected)
    place = f"{table.file}: embedding from byte "
    with LLM.load(copy, budget=RAM, heat=False, **TIGHT) as llm:
        for _ in range(2):
            with pytest.raises(StorageError, match=f"{place}{ids[3] // 5 * 960}, 960 bytes at offset") as raised:
                llm.logits(ids)
            assert raised.value.offset == table.offset + ids[3] // 5 * 960
        flip(table.file, table.offset + ids[3] * 192 + 100)
        assert torch.equal(llm.logits(ids), expected)
    (found,) = damage(catalog.checkpoint, lambda done, total: None)
    assert str(found).startswith(f"{place}{unused // 5 * 960},")


def test_an_embedding_under_one_checksum_is_left_to_verify(
    copy: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As packed before rows had their own checksums."""
    monkeypatch.setattr("tierlm.checkpoints.rows.BLOCK", 200)  # one row
    catalog = Catalog(copy)
    (seal,) = catalog.seals_of(catalog.embedding)
    flip(seal.file, seal.offset + ids[0] * 192)
    with LLM.load(copy, budget=RAM, heat=False, **TIGHT) as llm:
        llm.logits(ids)
    assert len(list(damage(catalog.checkpoint, lambda done, total: None))) == 1


def test_verify_names_what_is_missing_of_a_truncated_file(copy: Path) -> None:
    catalog = Catalog(copy)
    file = copy / "layer-00002.safetensors"
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    errors = list(damage(catalog.checkpoint, lambda done, total: None))
    assert len(errors) > 4 and all("layer-00002.safetensors" in str(error) for error in errors)


HEADERS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda meta: meta.update({"tierlm.version": "9"}), "version '9'"),
    (lambda meta: meta.update({"tierlm.records": "[1"}), "malformed"),
    (lambda meta: meta.update({"tierlm.records": '{"a": [0, "x", "0123456789abcdef"]}'}), "malformed"),
    (lambda meta: meta.update({"tierlm.records": '{"a": [0, 5, "zz"]}'}), "malformed"),
    (lambda meta: meta.update({"tierlm.records": f'{{"a": [{2**63}, 5, "0123456789abcdef"]}}'}), "malformed"),
    (lambda meta: meta.update({"tierlm.records": '{"a": [0, 5, "0123456789abcdef"]}'}), "expected a record as it was"),
]


@pytest.mark.parametrize(("change", "words"), HEADERS)
def test_a_header_that_lies_is_refused(change: Callable[[dict[str, Any]], Any], words: str, copy: Path) -> None:
    file = copy / "layer-00002.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=words):
        Catalog(copy)
