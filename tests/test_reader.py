"""Readers: identical bytes from both, errors that say where, and which reader is opened and why."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_files import content

from tierlm.checkpoints.checksum import Seal, checksum
from tierlm.checkpoints.reader import DirectReader, MmapReader, Reader, Request, open_reader, split
from tierlm.checkpoints.record import ALIGNMENT, Extent, TensorInfo
from tierlm.checkpoints.rows import Rows
from tierlm.errors import StorageError, UsageError
from tierlm.files import Stamp

PROFILE = settings(deadline=None, derandomize=True, max_examples=60)
REFUSER = Path("/proc/version")  # procfs has no O_DIRECT

MakeReader = Callable[..., Reader]
READERS: list[MakeReader] = [DirectReader, MmapReader]
both_readers = pytest.mark.parametrize("make", READERS, ids=["direct", "mmap"])


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[int], Path]:
    def make(size: int) -> Path:
        file = tmp_path / "model.safetensors"
        file.write_bytes(content(size))
        return file

    return make


pytestmark = pytest.mark.usefixtures("direct")


def whole(file: Path, start: int, stop: int, *tensors: TensorInfo) -> Extent:
    return Extent(file, start, stop, 0, tensors or (tensor(file, "w", start, stop),))


def tensor(file: Path, name: str, start: int, stop: int) -> TensorInfo:
    return TensorInfo(name, file, start, stop - start, "U8", (stop - start,))


def read(reader: Reader, extent: Extent, request_bytes: int = 2**20) -> bytes:
    """The wanted bytes of an extent, through memory aligned as readers require."""
    with mmap.mmap(-1, max(extent.hi - extent.lo, 1)) as memory, memoryview(memory) as view:
        for request in split(extent, request_bytes):
            with view[request.at : request.at + request.hi - request.lo] as part:
                reader.read(request, part)
        return bytes(view[extent.start - extent.lo : extent.stop - extent.lo])


def fails(reader: Reader, extent: Extent, name: str, words: str | None = None) -> StorageError:
    """Check that reading gives a StorageError that names file, tensor and offset, in words and as attributes."""
    with pytest.raises(StorageError, match=words) as caught:
        read(reader, extent)
    error = caught.value
    assert (error.file, error.tensor) == (str(extent.file), name)
    assert str(extent.file) in str(error) and name in str(error) and str(error.offset) in str(error)
    return error


def is_open(file: Path) -> bool:
    """Whether this process holds a descriptor of ``file``."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return str(file.resolve()) in map(os.path.realpath, links)


# --- bytes


@PROFILE
@given(
    size=st.integers(1, 5 * ALIGNMENT + 100),
    ends=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
)
def test_both_readers_give_the_bytes_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, size: int, ends: list[tuple[float, float]]
) -> None:
    file = tmp_path_factory.mktemp("reader") / "f"
    file.write_bytes(content(size))
    direct, mapped = DirectReader(), MmapReader()
    for one, other in ends:
        start, stop = sorted((round(one * size), round(other * size)))
        extent = whole(file, start, stop)
        assert read(direct, extent) == read(mapped, extent) == content(size)[start:stop]
    direct.close()
    mapped.close()


@both_readers
@pytest.mark.parametrize("size", [1, 511, 512, 4095, 4096, 4097, 3 * 4096 + 513])
def test_the_unaligned_tail_of_a_file(make_file: Callable[[int], Path], make: MakeReader, size: int) -> None:
    file, reader = make_file(size), make()
    assert read(reader, whole(file, 0, size)) == content(size)
    assert read(reader, whole(file, size - 1, size)) == content(size)[-1:]
    reader.close()


@both_readers
def test_bytes_outside_the_request_are_not_touched(make_file: Callable[[int], Path], make: MakeReader) -> None:
    file, reader = make_file(5 * ALIGNMENT), make()
    request = Request(whole(file, 100, 5 * ALIGNMENT), ALIGNMENT, 3 * ALIGNMENT)
    with mmap.mmap(-1, 4 * ALIGNMENT) as memory:
        memory[:] = b"\xaa" * len(memory)
        with memoryview(memory) as view, view[ALIGNMENT : 3 * ALIGNMENT] as part:
            reader.read(request, part)
        assert memory[ALIGNMENT : 3 * ALIGNMENT] == content(5 * ALIGNMENT)[ALIGNMENT : 3 * ALIGNMENT]
        assert memory[:ALIGNMENT] == memory[3 * ALIGNMENT :] == b"\xaa" * ALIGNMENT
    reader.close()


@given(start=st.integers(0, 10_000), size=st.integers(0, 100_000), at=st.integers(0, 3))
@PROFILE
def test_requests_cover_an_extent_without_overlap(start: int, size: int, at: int) -> None:
    extent = Extent(Path("f"), start, start + size, at * ALIGNMENT, (tensor(Path("f"), "w", start, start + size),))
    most = 5 * ALIGNMENT
    requests = split(extent, most)
    edge, wanted = extent.lo, 0
    for request in requests:
        assert request.lo == edge and request.hi > request.lo and request.hi - request.lo <= most
        assert request.at == extent.at + request.lo - extent.lo
        wanted += request.stop - request.start
        edge = request.hi
    assert edge == extent.hi and wanted == size
    lengths = [request.hi - request.lo for request in requests]
    assert not lengths or max(lengths) - min(lengths) <= (len(lengths) - 1) * ALIGNMENT, "about as long as one another"
    assert len(lengths) == -(-(extent.hi - extent.lo) // most), "and no more than needed"


def test_an_extent_longer_than_a_request_is_read_whole(make_file: Callable[[int], Path]) -> None:
    file = make_file(9 * ALIGNMENT + 77)
    extent = whole(file, 333, 9 * ALIGNMENT + 70)
    assert len(split(extent, 2 * ALIGNMENT)) == 5
    for reader in (DirectReader(), MmapReader()):
        assert read(reader, extent, 2 * ALIGNMENT) == content(9 * ALIGNMENT + 70)[333:]
        reader.close()


# --- errors


@both_readers
@pytest.mark.parametrize("left", [0, 1, 4095, 4096, 9_000, 19_999])
def test_file_truncated_after_it_was_opened(make_file: Callable[[int], Path], make: MakeReader, left: int) -> None:
    file, reader = make_file(20_000), make()
    first, second = tensor(file, "first.w", 100, 10_000), tensor(file, "second.w", 10_000, 20_000)
    extent = whole(file, 100, 20_000, first, second)
    assert read(reader, extent) == content(20_000)[100:]
    os.truncate(file, left)
    error = fails(reader, extent, "first.w" if left < 10_000 else "second.w")
    assert error.offset == left
    reader.close()


@both_readers
def test_truncated_file_can_still_be_read_before_its_end(make_file: Callable[[int], Path], make: MakeReader) -> None:
    file, reader = make_file(20_000), make()
    assert read(reader, whole(file, 0, 20_000)) == content(20_000)
    os.truncate(file, 10_000)
    assert read(reader, whole(file, 5_000, 10_000)) == content(10_000)[5_000:]
    fails(reader, whole(file, 5_000, 10_001), "w")
    reader.close()


TRUNCATIONS = """
import mmap, os, sys, threading, time
from pathlib import Path
from tierlm.checkpoints.record import Extent, TensorInfo
from tierlm.checkpoints.reader import MmapReader, Request
from tierlm.errors import StorageError

file, size, reader = Path(sys.argv[1]), 2**22, MmapReader()
file.write_bytes(bytes(size))
request = Request(Extent(file, 0, size, 0, (TensorInfo("w", file, 0, size, "U8", (size,)),)), 0, size)
end = time.monotonic() + 0.5

def truncate():
    while time.monotonic() < end:
        os.truncate(file, 0)
        os.truncate(file, size)

thread = threading.Thread(target=truncate)
thread.start()
memory = memoryview(mmap.mmap(-1, size))
found = set()
while thread.is_alive():
    try:
        found.add(reader.read(request, memory))
    except StorageError:
        found.add("error")
print(found)
"""


def test_file_truncated_while_it_is_read_is_no_sigbus(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRUNCATIONS, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


@both_readers
def test_file_replaced_before_its_first_read(
    make_file: Callable[[int], Path], make: MakeReader, tmp_path: Path
) -> None:
    """Of the same size: another inode says so."""
    file = make_file(5_000)
    reader = make({file: Stamp.of(file)})
    (tmp_path / "other").write_bytes(bytes(5_000))
    os.replace(tmp_path / "other", file)
    fails(reader, whole(file, 0, 5_000), "w", "changed or replaced since its header was read .*inode")
    assert not is_open(file)
    reader.close()


@both_readers
def test_file_changed_while_it_is_open_is_named_by_a_failed_read(
    make_file: Callable[[int], Path], make: MakeReader
) -> None:
    file = make_file(20_000)
    reader = make({file: Stamp.of(file)})
    assert read(reader, whole(file, 0, 20_000)) == content(20_000)
    file.write_bytes(bytes(10_000))
    fails(reader, whole(file, 0, 20_000), "w", "expected .* found .*; the file was changed or replaced since .*size")
    reader.close()


@both_readers
def test_missing_file(tmp_path: Path, make: MakeReader) -> None:
    reader = make()
    error = fails(reader, whole(tmp_path / "gone.safetensors", 5_000, 6_000), "w")
    assert 0 <= error.offset <= 5_000
    reader.close()


@both_readers
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, make: MakeReader) -> None:
    reader = make()
    fails(reader, whole(tmp_path, 0, 100), "w")
    reader.close()


@both_readers
def test_closed_reader_has_no_open_file(make_file: Callable[[int], Path], make: MakeReader) -> None:
    file, reader = make_file(5_000), make()
    read(reader, whole(file, 0, 5_000))
    assert is_open(file)
    reader.close()
    assert not is_open(file)


# --- which reader


def fake_refusal(monkeypatch: pytest.MonkeyPatch, number: int = errno.EINVAL) -> None:
    """FAKE: os.open as on a file system without O_DIRECT."""
    real = os.open

    def refusing_open(path: os.PathLike[str] | str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing_open)


@pytest.mark.parametrize("name", ["direct", "auto"])
def test_direct_where_the_file_system_supports_it(make_file: Callable[[int], Path], name: str) -> None:
    file = make_file(5_000)
    reader, why = open_reader(name, [file])
    assert isinstance(reader, DirectReader) and why.startswith("direct:")
    assert read(reader, whole(file, 10, 5_000)) == content(5_000)[10:]
    reader.close()


def test_mmap_as_asked(make_file: Callable[[int], Path]) -> None:
    reader, why = open_reader("mmap", [make_file(5_000)])
    assert isinstance(reader, MmapReader) and "as requested" in why


def test_refused_direct_is_an_error_when_asked_for(
    make_file: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_file(5_000)
    fake_refusal(monkeypatch)
    with pytest.raises(UsageError, match="O_DIRECT") as caught:
        open_reader("direct", [file])
    assert str(file) in str(caught.value) and "mmap" in str(caught.value) and "Invalid argument" in str(caught.value)


def test_refused_direct_falls_back_to_mmap_and_says_why(
    make_file: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_file(5_000)
    fake_refusal(monkeypatch)
    reader, why = open_reader("auto", [file])
    assert isinstance(reader, MmapReader)
    assert why.startswith("mmap:") and "O_DIRECT" in why and str(file) in why and "Invalid argument" in why
    assert read(reader, whole(file, 10, 5_000)) == content(5_000)[10:]
    reader.close()


def test_a_direct_read_that_is_refused_counts_as_refusal(
    make_file: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems open with O_DIRECT and refuse the read. FAKE: os.preadv."""

    def refusing_preadv(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    file = make_file(5_000)
    monkeypatch.setattr(os, "preadv", refusing_preadv)
    reader, why = open_reader("auto", [file])
    assert isinstance(reader, MmapReader) and "O_DIRECT" in why
    assert not is_open(file)


def test_one_refusing_file_among_several_is_enough(make_file: Callable[[int], Path]) -> None:
    """A real file system that refuses: procfs."""
    try:
        os.close(os.open(REFUSER, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pass
    else:
        pytest.skip("this kernel's procfs accepts O_DIRECT")
    files = [make_file(5_000), REFUSER]
    reader, why = open_reader("auto", files)
    assert isinstance(reader, MmapReader) and str(REFUSER) in why
    with pytest.raises(UsageError, match=str(REFUSER)):
        open_reader("direct", files)


# --- rows


@PROFILE
@given(count=st.integers(1, 40), stride=st.integers(1, 3_000), offset=st.integers(0, 5_000), data=st.data())
def test_rows_come_in_the_order_asked_for(
    tmp_path_factory: pytest.TempPathFactory, count: int, stride: int, offset: int, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("rows") / "f"
    file.write_bytes(content(offset + count * stride))
    table = TensorInfo("embed", file, offset, count * stride, "U8", (count, stride))
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=12))
    expected = [content(offset + count * stride)[offset + r * stride : offset + (r + 1) * stride] for r in rows]
    with closing(Rows(table)) as opened:
        assert opened.read(rows) == b"".join(expected)


def test_rows_with_repeats(make_file: Callable[[int], Path]) -> None:
    table = TensorInfo("embed", make_file(1_000), 200, 800, "BF16", (40, 10))
    one = {row: content(1_000)[200 + 20 * row : 220 + 20 * row] for row in (0, 3, 39)}
    with closing(Rows(table)) as rows:
        assert rows.read([39, 3, 39, 0, 3]) == one[39] + one[3] + one[39] + one[0] + one[3]
        assert rows.read([]) == b""


@pytest.mark.parametrize("left", [0, 220, 221, 239])
def test_rows_of_a_truncated_file(make_file: Callable[[int], Path], left: int) -> None:
    """Truncated in place, while open."""
    file = make_file(1_000)
    table = TensorInfo("embed", file, 200, 800, "BF16", (40, 10))
    with closing(Rows(table)) as rows:
        os.truncate(file, left)
        if left:
            assert rows.read([0, 0]) == 2 * content(1_000)[200:220]
        with pytest.raises(StorageError, match="expected 20 bytes") as caught:
            rows.read([0, 1] if left else [0])
    error = caught.value
    assert (error.file, error.tensor, error.offset) == (str(file), "embed", 220 if left else 200)
    assert str(file) in str(error) and "embed" in str(error) and str(error.offset) in str(error)


def test_rows_of_a_missing_file(tmp_path: Path) -> None:
    table = TensorInfo("embed", tmp_path / "gone", 200, 800, "BF16", (40, 10))
    with pytest.raises(StorageError, match="embed") as caught:
        Rows(table)
    assert caught.value.file == str(tmp_path / "gone")


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_rows_of_a_file_that_loses_its_name(make_file: Callable[[int], Path], tmp_path: Path, how: str) -> None:
    """The open file is read to the end, checked blocks included."""
    file = make_file(1_000)
    table = TensorInfo("embed", file, 200, 800, "U8", (40, 20))
    seal = Seal("embed", file, 200, 800, checksum(content(1_000)[200:]))
    with closing(Rows(table, [seal])) as rows:
        if how == "replaced":
            (tmp_path / "other").write_bytes(bytes(1_000))
            os.replace(tmp_path / "other", file)
        else:
            file.unlink()
        assert rows.read([0, 39]) == content(1_000)[200:220] + content(1_000)[980:]


def test_rows_of_a_file_replaced_since_its_header_was_read(make_file: Callable[[int], Path], tmp_path: Path) -> None:
    file = make_file(1_000)
    table, stamp = TensorInfo("embed", file, 0, 1_000, "U8", (10, 100)), Stamp.of(file)
    (tmp_path / "other").write_bytes(bytes(1_000))
    os.replace(tmp_path / "other", file)
    with pytest.raises(StorageError, match=r"embed.*changed or replaced"):
        Rows(table, stamp=stamp)


def test_rows_close_their_file(make_file: Callable[[int], Path]) -> None:
    table = TensorInfo("embed", make_file(1_000), 0, 1_000, "U8", (10, 100))
    rows = Rows(table)
    rows.read([1, 2])
    assert is_open(table.file)
    rows.close()
    rows.close()
    assert not is_open(table.file)
