"""Copies of a model's files: which are accepted, which is read, and what happens when one fails."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm import LLM, Budget, SamplingParams
from tierlm.checkpoints import mirrors as mirrors_module
from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache
from tierlm.checkpoints.mirrors import Copy, MirrorReader, Volume, find_copies, open_disks
from tierlm.checkpoints.reader import DirectReader, MmapReader, Reader, Request, failure, split
from tierlm.checkpoints.record import Extent, TensorInfo
from tierlm.errors import CheckpointError, StorageError, UsageError
from tierlm.files import Stamp

PROFILE = settings(deadline=None, derandomize=True, max_examples=60)
NO_CACHE = ProfileCache(None)
WAIT = 20.0


def shard(file: Path, size: int = 20_000, name: str = "w", fill: int = 0) -> Path:
    """A safetensors file of one tensor, whose bytes have no period near a power of two."""
    header = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    content = bytes((i * 7 + fill) % 251 for i in range(size))
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return file


def whole(file: Path) -> Extent:
    size = os.path.getsize(file)
    return Extent(file, 0, size, 0, (TensorInfo("w", file, 0, size, "U8", (size,)),))


def read(reader: Reader, what: Path | Extent, request_bytes: int = 8192) -> bytes:
    extent = whole(what) if isinstance(what, Path) else what
    with mmap.mmap(-1, extent.hi) as memory, memoryview(memory) as view:
        for request in split(extent, request_bytes):
            with view[request.lo : request.hi] as part:
                reader.read(request, part)
        return bytes(view[: extent.stop])


class Disk(Reader):
    """FAKE: a disk that records requests, can be paused, and can fail."""

    name = "direct"

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.failing = self.closed = False
        self.running = threading.Event()
        self.running.set()
        self.began = threading.Semaphore(0)

    def read(self, request: Request, buffer: memoryview) -> None:
        self.files.append(request.extent.file)
        self.began.release()
        assert self.running.wait(WAIT)
        if self.failing:
            raise failure(request, request.lo, "made to fail")

    def close(self) -> None:
        self.closed = True


FILE, NAMES = Path("/model/f"), [Path("/model/f"), Path("/mirror/f")]
EXTENT = Extent(FILE, 0, 2**20, 0, (TensorInfo("w", FILE, 0, 2**20, "U8", (2**20,)),))


def mirrored(disks: Sequence[Disk], speeds: Sequence[float] = (1.0, 1.0)) -> MirrorReader:
    copies = [Copy(name, Volume(disk, speed)) for name, disk, speed in zip(NAMES, disks, speeds, strict=False)]
    return MirrorReader({FILE: copies})


def ask(reader: Reader, nbytes: int = 4096) -> None:
    reader.read(Request(EXTENT, 0, nbytes), memoryview(bytearray(nbytes)))


# --- which copy


def test_idle_disks_take_turns() -> None:
    disks = [Disk(), Disk()]
    reader = mirrored(disks)
    for _ in range(10):
        ask(reader)
    assert [len(disk.files) for disk in disks] == [5, 5]
    assert set(disks[0].files) == {NAMES[0]} and set(disks[1].files) == {NAMES[1]}


def test_a_busy_disk_is_left_alone() -> None:
    """Each gets one read while idle; from then on, all go to the disk whose reads finish."""
    disks = [Disk(), Disk()]
    reader = mirrored(disks)
    disks[0].running.clear()
    thread = threading.Thread(target=ask, args=(reader,))
    thread.start()
    assert disks[0].began.acquire(timeout=WAIT)
    for _ in range(10):
        ask(reader)
    assert [len(disk.files) for disk in disks] == [1, 10]
    disks[0].running.set()
    thread.join(WAIT)
    for _ in range(3):
        ask(reader)  # idle again, with less work done
    assert [len(disk.files) for disk in disks] == [4, 10]


@PROFILE
@given(speed=st.sampled_from([1.0, 2.0, 3.0]), count=st.integers(1, 12))
def test_what_is_under_way_is_shared_by_speed(speed: float, count: int) -> None:
    disks = [Disk(), Disk()]
    reader = mirrored(disks, (1e9, speed * 1e9))
    for disk in disks:
        disk.running.clear()
    threads = [threading.Thread(target=ask, args=(reader,)) for _ in range(count)]
    disks[0].began = disks[1].began
    for thread in threads:
        thread.start()
        assert disks[0].began.acquire(timeout=WAIT)
    first, second = (len(disk.files) for disk in disks)
    for disk in disks:
        disk.running.set()
    for thread in threads:
        thread.join(WAIT)
    assert abs(second - speed * first) <= max(speed, 1.0)


def test_a_read_alone_goes_to_the_faster_disk() -> None:
    disks = [Disk(), Disk()]
    reader = mirrored(disks, (1e9, 3e9))
    for _ in range(5):
        ask(reader)
    assert [len(disk.files) for disk in disks] == [0, 5]


def test_the_account_of_a_disk_ends_with_its_reads() -> None:
    disks = [Disk(), Disk()]
    disks[1].failing = True
    volumes = [Volume(disk) for disk in disks]
    reader = MirrorReader({FILE: [Copy(name, volume) for name, volume in zip(NAMES, volumes, strict=True)]})
    for _ in range(5):
        ask(reader)
    assert [volume.in_flight for volume in volumes] == [0, 0]


# --- failures


def test_a_failed_read_is_tried_on_the_next_copy() -> None:
    disks = [Disk(), Disk()]
    disks[0].failing = True
    reader = mirrored(disks)
    assert reader.troubles() == []
    for _ in range(5):
        ask(reader)
    assert [len(disk.files) for disk in disks] == [1, 5]  # once was enough
    (trouble,) = reader.troubles()
    assert str(NAMES[0]) in trouble and "made to fail" in trouble


def test_a_failed_copy_is_still_the_last_resort() -> None:
    disks = [Disk(), Disk()]
    reader = mirrored(disks)
    disks[0].failing = True
    ask(reader)
    disks[0].failing, disks[1].failing = False, True
    ask(reader)
    assert len(reader.troubles()) == 2


def test_when_all_copies_fail_all_are_named() -> None:
    disks = [Disk(), Disk()]
    for disk in disks:
        disk.failing = True
    with pytest.raises(StorageError, match="made to fail") as caught:
        ask(mirrored(disks))
    assert all(str(name) in str(caught.value) for name in NAMES)
    assert (caught.value.file, caught.value.tensor, caught.value.offset) == (str(FILE), "w", 0)


def test_a_file_without_copies_fails_as_it_would_alone() -> None:
    disk = Disk()
    disk.failing = True
    reader = MirrorReader({FILE: [Copy(FILE, Volume(disk))]})
    with pytest.raises(StorageError) as caught:
        ask(reader)
    assert str(caught.value) == "/model/f: reading w at offset 0: made to fail"
    assert reader.troubles() == []


def test_closing_closes_every_disk() -> None:
    disks = [Disk(), Disk()]
    mirrored(disks).close()
    assert all(disk.closed for disk in disks)


# --- which files are copies


@pytest.fixture
def model(tmp_path: Path) -> list[Path]:
    return [shard(tmp_path / "model" / f"{i}.safetensors", fill=i) for i in range(3)]


def copied(model: Sequence[Path], folder: Path, *which: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in which:
        shutil.copy(model[i], folder)
    return folder


def test_mirrors_may_be_partial(model: list[Path], tmp_path: Path) -> None:
    one, two = copied(model, tmp_path / "one", 0, 2), copied(model, tmp_path / "two", 2)
    assert find_copies(model, [one, two]) == {
        model[0]: [model[0], one / "0.safetensors"],
        model[1]: [model[1]],
        model[2]: [model[2], one / "2.safetensors", two / "2.safetensors"],
    }


def test_a_copy_of_another_size(model: list[Path], tmp_path: Path) -> None:
    one = copied(model, tmp_path / "one", 0, 1)
    size = os.path.getsize(model[1])
    os.truncate(one / "1.safetensors", size - 1)
    with pytest.raises(CheckpointError, match=f"expected {size} bytes") as caught:
        find_copies(model, [one])
    assert str(one / "1.safetensors") in str(caught.value) and str(size - 1) in str(caught.value)


def test_a_copy_of_another_file(model: list[Path], tmp_path: Path) -> None:
    one = copied(model, tmp_path / "one", 0)
    shard(one / "0.safetensors", name="v")
    assert os.path.getsize(one / "0.safetensors") == os.path.getsize(model[0])
    with pytest.raises(CheckpointError, match="header differs") as caught:
        find_copies(model, [one])
    assert str(one / "0.safetensors") in str(caught.value) and str(model[0]) in str(caught.value)


def test_a_copy_that_cannot_be_read(model: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = copied(model, tmp_path / "one", 0)

    def broken(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mirrors_module, "_header", broken)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        find_copies(model, [one])
    assert str(one / "0.safetensors") in str(caught.value)


@pytest.mark.parametrize("kind", ["no such folder", "a file", "empty", "other files", "itself", "a link", "twice"])
def test_a_mirror_that_adds_nothing(model: list[Path], tmp_path: Path, kind: str) -> None:
    folder, before = tmp_path / "one", list[Path]()
    if kind == "a file":
        folder.write_text("")
    elif kind == "empty":
        folder.mkdir()
    elif kind == "other files":
        shard(folder / "other.safetensors")
    elif kind == "itself":
        folder = model[0].parent
    elif kind == "a link":
        folder.mkdir()
        (folder / model[0].name).symlink_to(model[0])
    elif kind == "twice":
        before = [copied(model, folder, 0)]
    with pytest.raises(UsageError, match=f"mirror {folder}: expected") as caught:
        find_copies(model, [*before, folder])
    expected = {"no such folder": "a folder, found nothing", "a file": "a folder, found a file"}
    assert expected.get(kind, "other copies of the model's files") in str(caught.value)


# --- opened


def elsewhere() -> Path | None:
    """A folder on another file system than the temporary folder."""
    shm = Path("/dev/shm")
    other = shm.is_dir() and os.access(shm, os.W_OK) and os.stat(shm).st_dev != os.stat(tempfile.gettempdir()).st_dev
    return shm if other else None


@pytest.fixture
def other_disk() -> Iterator[Path]:
    parent = elsewhere()
    if parent is None:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", ["auto", "mmap"])
def test_equal_bytes_from_two_disks(model: list[Path], other_disk: Path, name: str) -> None:
    copied(model, other_disk, 0, 1)
    reader, profile, notes = open_disks(model, [other_disk], name, "auto", NO_CACHE, {})
    assert isinstance(reader, MirrorReader) and profile.depth == 2 * DiskProfile().depth
    assert sum(note.startswith("reader ") for note in notes) == sum(note.startswith("disk ") for note in notes) == 2
    for file in model:
        assert read(reader, file, 4096) == file.read_bytes()
    assert reader.troubles() == []
    reader.close()


def test_each_copy_is_read(model: list[Path], other_disk: Path) -> None:
    """Different bytes in the copy show which one was read: only headers are compared."""
    shard(other_disk / model[0].name, fill=100)
    reader, _, _ = open_disks(model, [other_disk], "auto", "off", NO_CACHE, {})
    found, one, other = (
        read(reader, model[0], 4096),
        model[0].read_bytes(),
        (other_disk / model[0].name).read_bytes(),
    )
    pages = range(0, len(found), 4096)
    origins = [
        (found[at : at + 4096] == one[at : at + 4096], found[at : at + 4096] == other[at : at + 4096]) for at in pages
    ]
    assert set(origins) == {(True, False), (False, True)}
    reader.close()


def test_copies_on_one_disk_share_its_depth(model: list[Path], tmp_path: Path) -> None:
    one = copied(model, tmp_path / "one", 0, 1, 2)
    reader, profile, notes = open_disks(model, [one], "auto", "auto", NO_CACHE, {})
    assert profile == DiskProfile() and len(notes) == 2
    assert [read(reader, file) for file in model] == [file.read_bytes() for file in model]
    reader.close()


def test_a_file_replaced_since_its_header_was_read_is_read_from_its_copy(model: list[Path], tmp_path: Path) -> None:
    one, content = copied(model, tmp_path / "one", 1), model[1].read_bytes()
    reader, _, _ = open_disks(model, [one], "auto", "off", NO_CACHE, {file: Stamp.of(file) for file in model})
    shard(tmp_path / "other", fill=100).replace(model[1])
    assert read(reader, model[1]) == content
    assert "changed or replaced" in reader.troubles()[0]
    reader.close()


def test_a_missing_file_is_read_from_its_copy(model: list[Path], tmp_path: Path) -> None:
    one = copied(model, tmp_path / "one", 1)
    reader, _, _ = open_disks(model, [one], "auto", "auto", NO_CACHE, {})
    content, extent = model[1].read_bytes(), whole(model[1])
    model[1].unlink()
    assert read(reader, extent) == content
    assert len(reader.troubles()) == 1 and str(model[1]) in reader.troubles()[0]
    reader.close()


def test_without_mirrors_there_is_one_plain_reader(model: list[Path]) -> None:
    reader, profile, notes = open_disks(model, [], "auto", "auto", NO_CACHE, {})
    assert isinstance(reader, (DirectReader, MmapReader)) and profile == DiskProfile() and len(notes) == 2


def test_a_model_over_two_disks_needs_no_option(model: list[Path], other_disk: Path) -> None:
    """For example, if one shard is a link to another disk."""
    shutil.move(model[2], other_disk)
    model[2].symlink_to(other_disk / model[2].name)
    reader, profile, notes = open_disks(model, [], "auto", "auto", NO_CACHE, {})
    assert isinstance(reader, MirrorReader) and profile.depth == 2 * DiskProfile().depth and len(notes) == 4
    assert [read(reader, file) for file in model] == [file.read_bytes() for file in model]
    reader.close()


def test_disks_are_weighed_by_what_the_probe_found(
    model: list[Path], other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(model, other_disk, 0, 1, 2)
    speeds: dict[Path, float | None] = {model[0].parent: 1e9, other_disk: 4e9}

    def found(_: Reader, files: Sequence[Path], *rest: object) -> tuple[DiskProfile, str]:
        speed = speeds[files[0].parent]
        return DiskProfile(2**20, 4, speed, None if speed is None else 0.001), "disk"

    monkeypatch.setattr(mirrors_module, "find_profile", found)
    reader, profile, _ = open_disks(model, [other_disk], "auto", "auto", NO_CACHE, {})
    assert isinstance(reader, MirrorReader) and (profile.depth, profile.bytes_per_second) == (8, 5e9)
    assert [copy.volume.speed for copy in reader._copies[model[0]]] == [1e9, 4e9]
    speeds[other_disk] = None
    reader, profile, _ = open_disks(model, [other_disk], "auto", "auto", NO_CACHE, {})
    assert isinstance(reader, MirrorReader) and profile.bytes_per_second is None
    assert [copy.volume.speed for copy in reader._copies[model[0]]] == [1.0, 1.0]


def test_each_disk_has_its_own_reader(model: list[Path], other_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAKE: os.open as if the other file system had no O_DIRECT."""
    copied(model, other_disk, 0, 1, 2)
    real = os.open

    def refusing_open(path: os.PathLike[str] | str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and str(path).startswith(str(other_disk)):
            raise OSError(22, "Invalid argument", str(path))
        return real(path, flags, *rest)

    try:
        os.close(os.open(model[0], os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary folder's file system has no O_DIRECT")
    monkeypatch.setattr(os, "open", refusing_open)
    reader, _, notes = open_disks(model, [other_disk], "auto", "auto", NO_CACHE, {})
    assert reader.name == "direct+mmap"
    assert any(note.startswith("reader direct:") for note in notes)
    assert any(note.startswith("reader mmap:") and str(other_disk) in note for note in notes)
    assert [read(reader, file) for file in model] == [file.read_bytes() for file in model]
    reader.close()
    with pytest.raises(UsageError, match=str(other_disk)):
        open_disks(model, [other_disk], "direct", "auto", NO_CACHE, {})


def test_a_failure_while_opening_leaves_no_file_open(
    model: list[Path], other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(model, other_disk, 0)
    probed: list[Reader] = []

    def probe(reader: Reader, files: Sequence[Path], *rest: object) -> tuple[DiskProfile, str]:
        read(reader, files[0])
        probed.append(reader)
        if len(probed) == 2:
            raise KeyboardInterrupt
        return DiskProfile(), "disk"

    monkeypatch.setattr(mirrors_module, "find_profile", probe)
    with pytest.raises(KeyboardInterrupt):
        open_disks(model, [other_disk], "auto", "auto", NO_CACHE, {})
    links = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not links & {str(model[0]), str(other_disk / model[0].name)}


# --- a loaded model


def test_same_tokens_when_a_mirror_fails(toy_v3: tuple[Path, Any], other_disk: Path) -> None:
    for file in toy_v3[0].glob("*.safetensors"):
        shutil.copy(file, other_disk)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    tight = {"ram_slots": 5, "resident_trunks": 1}
    with LLM.load(toy_v3[0], budget=Budget("8GiB"), **tight) as llm:
        expected = llm.generate([[5, 6, 7]], params)[0].ids
    with LLM.load(toy_v3[0], budget=Budget("8GiB"), mirrors=(str(other_disk),), **tight) as llm:
        assert llm.generate([[5, 6, 7]], params)[0].ids == expected
        for file in other_disk.iterdir():
            os.truncate(file, 5000)
        assert llm.generate([[5, 6, 7]], params)[0].ids == expected
        assert any("a copy failed" in note and str(other_disk) in note for note in llm.stats().notes)


def test_same_tokens_with_a_mirror_on_another_disk(other_disk: Path) -> None:
    """The embedded demo model."""
    from tierlm.checkpoints.hub import DEMO

    for file in DEMO.glob("*.safetensors"):
        shutil.copy(file, other_disk)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with LLM.load("demo", budget=Budget("8GiB"), ram_slots=20) as llm:
        expected = llm.generate("The President", params)
    with LLM.load("demo", budget=Budget("8GiB"), ram_slots=20, mirrors=[other_disk]) as llm:
        assert llm.generate("The President", params) == expected
        reader = llm._runtime.reader
        assert isinstance(reader, MirrorReader) and reader.troubles() == []
        volumes = {copy.volume for copies in reader._copies.values() for copy in copies}
        assert len(volumes) == 2 and all(volume.total > 0 and volume.in_flight == 0 for volume in volumes)
