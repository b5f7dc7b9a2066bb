"""Checkpoints read in place: headers against the `safetensors` library, bad files, and the layout of records."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tierlm.checkpoints.checkpoint import ITEM_SIZE, Checkpoint, read_header
from tierlm.checkpoints.reader import MmapReader, Reader, open_reader, split
from tierlm.checkpoints.record import ALIGNMENT, MERGE_GAP, Record, TensorInfo, build_record
from tierlm.errors import CheckpointError, UnsupportedModelError

PROFILE = settings(deadline=None, derandomize=True, max_examples=40)

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
KINDS = st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES)


def filled(dtype: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """A tensor of random bytes (of zeros and ones, for bool)."""
    numbers = torch.Generator().manual_seed(seed)
    size = int(torch.tensor(shape).prod()) if shape else 1
    if dtype == "BOOL":
        return torch.randint(2, (size,), generator=numbers).bool().view(tuple(shape))
    raw = torch.randint(256, (size * ITEM_SIZE[dtype],), generator=numbers, dtype=torch.uint8)
    return raw.view(TORCH_DTYPES[dtype]).view(tuple(shape))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def entry(start: Any, stop: Any, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_raw(file: Path, header: bytes | Mapping[str, Any], data: int = 0) -> Path:
    """A safetensors file with any header, followed by ``data`` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return file


def write_index(folder: Path, weight_map: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def refused(folder: Path, *names: str) -> str:
    """Check that the folder is refused with a message that has all of ``names``; returns the message."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    for name in names:
        assert name in str(caught.value)
    return str(caught.value)


# --- well-formed files


@PROFILE
@given(kinds=st.dictionaries(NAMES, KINDS, min_size=1, max_size=8), metadata=st.booleans())
def test_header_agrees_with_the_safetensors_library(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[str, tuple[int, ...]]], metadata: bool
) -> None:
    file = tmp_path_factory.mktemp("header") / "model.safetensors"
    tensors = {name: filled(dtype, shape, seed) for seed, (name, (dtype, shape)) in enumerate(kinds.items())}
    save_file(tensors, file, {"format": "pt"} if metadata else None)
    found, content = read_header(file).tensors, file.read_bytes()
    with safe_open(file, "pt") as reference:
        assert set(found) == set(reference.keys()) == set(tensors)
        for name, tensor in found.items():
            part = reference.get_slice(name)
            assert (tensor.name, tensor.file) == (name, file)
            assert (tensor.dtype, tensor.shape) == (part.get_dtype(), tuple(part.get_shape()))
            assert content[tensor.offset : tensor.offset + tensor.nbytes] == raw_bytes(reference.get_tensor(name))
    begin = 8 + int.from_bytes(content[:8], "little")
    declared = {name: value for name, value in json.loads(content[8:begin]).items() if name != "__metadata__"}
    offsets = {name: [t.offset - begin, t.offset - begin + t.nbytes] for name, t in found.items()}
    assert offsets == {name: value["data_offsets"] for name, value in declared.items()}


def test_checkpoint_finds_one_file_several_files_and_an_index(tmp_path: Path) -> None:
    one, other = filled("F32", (2, 3), 1), filled("BF16", (4,), 2)
    single, several, indexed = (tmp_path / name for name in ("single", "several", "indexed"))
    for folder in (single, several, indexed):
        folder.mkdir()
    save_file({"one": one, "other": other}, single / "model.safetensors")
    for folder in (several, indexed):
        save_file({"one": one}, folder / "a.safetensors")
        save_file({"other": other}, folder / "b.safetensors")
    write_index(indexed, {"one": "a.safetensors", "other": "b.safetensors"})
    for folder in (single, several, indexed):
        checkpoint = Checkpoint(folder)
        assert set(checkpoint.tensors) == {"one", "other"}
        assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == 24 + 8
        assert checkpoint.tensor("one", (2, 3)).dtype == "F32"


def test_index_decides_which_files_are_read(tmp_path: Path) -> None:
    save_file({"one": filled("F32", (2,), 1)}, tmp_path / "a.safetensors")
    (tmp_path / "left-over.safetensors").write_bytes(b"rubbish")
    write_index(tmp_path, {"one": "a.safetensors"})
    assert set(Checkpoint(tmp_path).tensors) == {"one"}


def test_rows_of_a_tensor_are_a_part_of_its_bytes(tmp_path: Path) -> None:
    table = filled("F16", (7, 5), 3)
    save_file({"table": table}, tmp_path / "model.safetensors")
    part = Checkpoint(tmp_path).tensor("table").rows(2, 6)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert part.shape == (4, 5)
    assert content[part.offset : part.offset + part.nbytes] == raw_bytes(table[2:6])


# --- bad files

GOOD = entry(0, 4)
HUGE = 10**3000  # two of them multiply to a number that Python refuses to print
BAD_HEADERS: dict[str, tuple[bytes | dict[str, Any], int, str]] = {  # header, bytes of data, what the message names
    "not JSON": (b"{'single': quotes}", 0, ""),
    "not UTF-8": (b'{"\xff\xfe": 1}', 0, ""),
    "empty": (b"", 0, ""),
    "nested without end": (b"[" * 200_000, 0, ""),
    "a list": (b"[]", 0, ""),
    "a number": (b"3", 0, ""),
    "entry is null": ({"bad.w": None}, 4, "bad.w"),
    "entry is a list": ({"bad.w": [0, 4]}, 4, "bad.w"),
    "entry without dtype": ({"bad.w": {"shape": [1], "data_offsets": [0, 4]}}, 4, "bad.w"),
    "entry without shape": ({"bad.w": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "bad.w"),
    "entry without offsets": ({"bad.w": {"dtype": "F32", "shape": [1]}}, 4, "bad.w"),
    "one offset": ({"bad.w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4, "bad.w"),
    "three offsets": ({"bad.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 8, "bad.w"),
    "negative start": ({"good": GOOD, "bad.w": entry(-4, 0)}, 4, "bad.w"),
    "negative stop": ({"bad.w": entry(0, -4)}, 4, "bad.w"),
    "stop before start": ({"bad.w": entry(4, 0)}, 4, "bad.w"),
    "offset is a float": ({"bad.w": entry(0.0, 4.0)}, 4, "bad.w"),
    "offset is a text": ({"bad.w": entry("0", "4")}, 4, "bad.w"),
    "offset is a truth value": ({"bad.w": entry(False, 4)}, 4, "bad.w"),
    "offset is null": ({"bad.w": entry(None, 4)}, 4, "bad.w"),
    "shape is a number": ({"bad.w": entry(0, 4, 1)}, 4, "bad.w"),
    "shape is a text": ({"bad.w": entry(0, 4, "1")}, 4, "bad.w"),
    "shape has a float": ({"bad.w": entry(0, 4, [1.0])}, 4, "bad.w"),
    "shape is negative": ({"bad.w": entry(0, 4, [-1])}, 4, "bad.w"),
    "shape is negative twice": ({"bad.w": entry(0, 4, [-1, -1])}, 4, "bad.w"),
    "shape is huge": ({"bad.w": entry(0, 4, [2**62, 2**62])}, 4, "bad.w"),
    "shape is beyond printing": ({"bad.w": entry(0, 4, [HUGE, HUGE])}, 4, "bad.w"),
    "span below shape": ({"bad.w": entry(0, 4, [2])}, 8, "bad.w"),
    "span above shape": ({"bad.w": entry(0, 8, [1])}, 8, "bad.w"),
    "span of another dtype": ({"bad.w": entry(0, 4, [1], "F16")}, 4, "bad.w"),
    "past the end": ({"good": GOOD, "bad.w": entry(4, 8)}, 7, "bad.w"),
    "far past the end": ({"bad.w": entry(2**60, 2**60 + 4)}, 4, "bad.w"),
    "dtype is a list": ({"bad.w": entry(0, 4, [1], ["F32"])}, 4, "bad.w"),
    "dtype is null": ({"bad.w": entry(0, 4, [1], None)}, 4, "bad.w"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_names_file_and_tensor(tmp_path: Path, case: str) -> None:
    header, data, name = BAD_HEADERS[case]
    file = write_raw(tmp_path / "model.safetensors", header, data)
    refused(tmp_path, str(file), name)


def test_overlap_names_both_tensors(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"first": entry(0, 8, [2]), "second": entry(4, 12, [2])}, 12)
    refused(tmp_path, str(file), "first", "second", "overlaps")


def test_two_tensors_of_the_same_bytes_overlap(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"first": entry(0, 4), "second": entry(0, 4)}, 4)
    refused(tmp_path, str(file), "first", "second")


def test_empty_tensors_do_not_overlap_their_neighbours(tmp_path: Path) -> None:
    header = {"a": entry(0, 4), "z": entry(4, 4, [0]), "b": entry(4, 8)}
    write_raw(tmp_path / "model.safetensors", header, 8)
    assert set(Checkpoint(tmp_path).tensors) == {"a", "z", "b"}


def test_tensor_that_stands_twice_names_file_and_tensor(tmp_path: Path) -> None:
    one = json.dumps(GOOD)
    file = write_raw(tmp_path / "model.safetensors", f'{{"twice.w": {one}, "twice.w": {one}}}'.encode(), 4)
    refused(tmp_path, str(file), "twice.w")


def test_entry_with_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = b'{"w": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}'
    refused(tmp_path, str(write_raw(tmp_path / "model.safetensors", text, 4)))


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "f32", ""])
def test_unknown_dtype_is_unsupported(tmp_path: Path, dtype: str) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"odd.w": entry(0, 4, [1], dtype)}, 4)
    with pytest.raises(UnsupportedModelError, match=re.escape(str(file))) as caught:
        Checkpoint(tmp_path)
    assert "odd.w" in str(caught.value) and "BF16" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0", b"1234567"])
def test_file_shorter_than_eight_bytes(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    refused(tmp_path, str(file), str(len(content)))


@pytest.mark.parametrize("announced", [3, 100_000_001, 2**63, 2**64 - 1])
def test_header_length_that_lies(tmp_path: Path, announced: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(announced.to_bytes(8, "little") + b"{}")
    refused(tmp_path, str(file), str(announced))


def test_header_length_beyond_the_limit_is_refused_without_reading(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as stream:
        stream.write((2**28).to_bytes(8, "little"))
        stream.truncate(2**28 + 8)  # sparse, with the stated length
    refused(tmp_path, str(file))


@pytest.mark.parametrize("left", [-1, -24, 60, 12, 8, 4, 0])
def test_truncated_shard_names_the_shard(tmp_path: Path, left: int) -> None:
    save_file({"whole": filled("F32", (4,), 1)}, tmp_path / "a.safetensors")
    shard = tmp_path / "b.safetensors"
    save_file({"cut.w": filled("F32", (6,), 2)}, shard)
    write_index(tmp_path, {"whole": "a.safetensors", "cut.w": "b.safetensors"})
    assert set(Checkpoint(tmp_path).tensors) == {"whole", "cut.w"}
    shard.write_bytes(shard.read_bytes()[: left or None] if left else b"")
    refused(tmp_path, str(shard), "cut.w" if left < 0 else "")


def test_missing_shard_named_by_the_index(tmp_path: Path) -> None:
    save_file({"there": filled("F32", (4,), 1)}, tmp_path / "a.safetensors")
    write_index(tmp_path, {"there": "a.safetensors", "gone": "b.safetensors"})
    refused(tmp_path, str(tmp_path / "b.safetensors"), "missing", "model.safetensors.index.json")


def test_shard_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    write_index(tmp_path, {"w": "a.safetensors"})
    refused(tmp_path, str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/ABSOLUTE", "a/b.safetensors", "./x.safetensors", "..", ".", ""]
)
def test_index_that_leads_out_of_its_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for there in (tmp_path / "x", folder / "x", folder / "a" / "b"):  # all of them exist and are valid
        save_file({"w": filled("F32", (4,), 1)}, there.with_suffix(".safetensors"))
    shard = str(tmp_path / "x.safetensors") if shard == "/ABSOLUTE" else shard
    index = write_index(folder, {"w": shard})
    refused(folder, str(index), repr(shard))


def test_index_that_names_a_tensor_which_is_not_in_its_shard(tmp_path: Path) -> None:
    save_file({"here": filled("F32", (4,), 1)}, tmp_path / "a.safetensors")
    index = write_index(tmp_path, {"here": "a.safetensors", "elsewhere": "a.safetensors"})
    refused(tmp_path, str(index), "elsewhere", "a.safetensors")


@pytest.mark.parametrize("weight_map", [None, [], "a.safetensors", {"w": 1}, {"w": None}, {"w": ["a.safetensors"]}])
def test_index_without_a_proper_weight_map(tmp_path: Path, weight_map: Any) -> None:
    refused(tmp_path, str(write_index(tmp_path, weight_map)), "weight_map")


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 200_000])
def test_index_that_is_not_json(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    refused(tmp_path, str(index))


def test_tensor_in_two_shards_without_index(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"both": filled("F32", (4,), 1), name: filled("F32", (4,), 2)}, tmp_path / name)
    refused(tmp_path, str(tmp_path / "b.safetensors"), "both", "a.safetensors")


def test_folder_without_tensors(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "model.safetensors")


def test_missing_tensor_and_wrong_shape_are_named(tmp_path: Path) -> None:
    save_file({"w": filled("F32", (4, 2), 1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="tensor x is missing"):
        checkpoint.tensor("x")
    with pytest.raises(CheckpointError, match=r"w has shape \[4, 2\], expected \[2, 4\]") as caught:
        checkpoint.tensor("w", (2, 4))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


# --- records


def fetch(record: Record, reader: Reader) -> bytes:
    """All bytes of a record, read as at run time, into memory that was not zero before."""
    with mmap.mmap(-1, max(record.nbytes, 1)) as memory:
        memory[:] = b"\xaa" * len(memory)
        view = memoryview(memory)
        for extent in record.extents:
            for request in split(extent, 2**20):
                with view[request.at : request.at + request.hi - request.lo] as part:
                    reader.read(request, part)
        found = bytes(view[: record.nbytes])
        view.release()
    return found


def readers(files: Sequence[Path]) -> list[Reader]:
    """Both readers; only the memory-mapped one if the file system refuses O_DIRECT."""
    auto, _ = open_reader("auto", files)
    return [auto] if auto.name == "mmap" else [auto, MmapReader()]


def check_record(tensors: Mapping[str, TensorInfo], record: Record) -> None:
    """A record's promises: alignment, no overlap, reads no longer than the pages need, every tensor's exact bytes."""
    assert record.nbytes % ALIGNMENT == 0
    assert set(record.places) == set(tensors)
    at = 0
    for extent in record.extents:
        assert extent.at == at and extent.at % ALIGNMENT == extent.lo % ALIGNMENT == extent.hi % ALIGNMENT == 0
        assert 0 <= extent.start - extent.lo < ALIGNMENT and 0 <= extent.hi - extent.stop < ALIGNMENT
        assert extent.start == min(t.offset for t in extent.tensors)
        assert extent.stop == max(t.offset + t.nbytes for t in extent.tensors)
        assert {t.file for t in extent.tensors} == {extent.file}
        at += extent.hi - extent.lo
    assert at == record.nbytes
    for role, tensor in tensors.items():
        place = record.places[role]
        assert (place.nbytes, place.dtype, place.shape) == (tensor.nbytes, tensor.dtype, tensor.shape)
        (extent,) = (extent for extent in record.extents if tensor in extent.tensors)
        assert place.offset == extent.at + tensor.offset - extent.lo
        assert tensor.nbytes == 0 or extent.tensor_at(tensor.offset) == tensor.name
    for reader in readers([tensor.file for tensor in tensors.values()]):
        content = fetch(record, reader)
        for role, tensor in tensors.items():
            place = record.places[role]
            expected = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
            assert content[place.offset : place.offset + place.nbytes] == expected, (reader.name, role)
        reader.close()


SIZES = st.lists(st.one_of(st.integers(1, 64), st.integers(1, 9000), st.integers(1, 150_000)), min_size=1, max_size=7)


@PROFILE
@given(shards=st.lists(SIZES, min_size=1, max_size=2), data=st.data())
def test_records_hold_the_exact_bytes_of_their_tensors(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("record")
    for number, sizes in enumerate(shards):
        tensors = {f"{number}.{i}": filled("U8", (size,), 100 * number + i) for i, size in enumerate(sizes)}
        save_file(tensors, folder / f"{number}.safetensors")
    found = Checkpoint(folder).tensors
    names = data.draw(st.lists(st.sampled_from(sorted(found)), min_size=1, unique=True))
    chosen = {f"role {i}": found[name] for i, name in enumerate(names)}
    record = build_record(chosen)
    check_record(chosen, record)
    for before, after in zip(record.extents, record.extents[1:], strict=False):
        assert before.file != after.file or after.start - before.stop > MERGE_GAP
    for extent in record.extents:
        for one, other in zip(extent.tensors, extent.tensors[1:], strict=False):
            assert other.offset - (one.offset + one.nbytes) <= MERGE_GAP


def plain_file(file: Path, size: int) -> Path:
    file.write_bytes(raw_bytes(filled("U8", (size,), 5)))
    return file


def part(file: Path, name: str, offset: int, nbytes: int) -> TensorInfo:
    return TensorInfo(name, file, offset, nbytes, "U8", (nbytes,))


@pytest.mark.parametrize(("gap", "reads"), [(0, 1), (1, 1), (MERGE_GAP, 1), (MERGE_GAP + 1, 2), (4 * MERGE_GAP, 2)])
def test_adjacent_tensors_become_one_read_and_far_ones_two(tmp_path: Path, gap: int, reads: int) -> None:
    file = plain_file(tmp_path / "f", 5 * MERGE_GAP + 20_000)
    tensors = {"b": part(file, "second", 5_777 + gap, 6_001), "a": part(file, "first", 777, 5_000)}
    record = build_record(tensors)
    assert len(record.extents) == reads
    check_record(tensors, record)


def test_tensors_of_two_files_are_never_one_read(tmp_path: Path) -> None:
    one, other = plain_file(tmp_path / "1", 9_000), plain_file(tmp_path / "2", 9_000)
    tensors = {"a": part(one, "a", 0, 5_000), "b": part(other, "b", 5_000, 4_000)}
    record = build_record(tensors)
    assert [extent.file for extent in record.extents] == [one, other]
    check_record(tensors, record)


def test_one_tensor_in_two_roles_is_read_once(tmp_path: Path) -> None:
    file = plain_file(tmp_path / "f", 9_000)
    tensors = {"a": part(file, "w", 100, 5_000), "b": part(file, "w", 100, 5_000)}
    record = build_record(tensors)
    assert len(record.extents) == 1 and record.nbytes == 2 * ALIGNMENT
    assert record.places["a"] == record.places["b"]
    check_record({"a": tensors["a"]}, build_record({"a": tensors["a"]}))


@pytest.mark.parametrize("roles", ["ab", "ba"])
def test_an_empty_tensor_does_not_cut_its_neighbour_short(tmp_path: Path, roles: str) -> None:
    file = plain_file(tmp_path / "f", 9_000)
    tensors = {"a": part(file, "full", 100, 8_000), "b": part(file, "empty", 100, 0)}
    ordered = {role: tensors[role] for role in roles}
    check_record(ordered, build_record(ordered))


def test_record_of_nothing_is_empty() -> None:
    record = build_record({})
    assert (record.nbytes, record.extents, dict(record.places)) == (0, (), {})
