"""Files that are written completely or not at all, and read only if they are regular and small enough."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest

from tierlm import files
from tierlm.files import Stamp, open_regular, read_regular, whole, write_whole

both_ways = pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])


@pytest.fixture
def way(nameless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with or without files without names."""
    if not nameless:
        monkeypatch.setattr(files, "_nameless", lambda folder: None)


@both_ways
@pytest.mark.usefixtures("way")
def test_new_or_old_with_the_users_permissions(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    write_whole(file, "one")
    write_whole(file, "two")
    assert file.read_text() == "two"
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(file.parent.iterdir()) == [file]


@both_ways
@pytest.mark.usefixtures("way")
def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \udc00")  # fails after the temporary file was opened
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_is_seen_of_a_file_before_it_is_whole(tmp_path: Path) -> None:
    """So that a killed process leaves nothing."""
    with whole(tmp_path / "file") as stream:
        stream.write(b"half")
        stream.flush()
        assert not list(tmp_path.iterdir())
    assert (tmp_path / "file").read_text() == "half"


def test_what_a_kill_left_between_name_and_place_is_removed_later(tmp_path: Path) -> None:
    """But not what another process is about to put in its place, nor files of others."""
    for name in (".tierlm-dead", ".tierlm-alive", ".other"):
        (tmp_path / name).touch()
    with open(tmp_path / ".tierlm-alive") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        write_whole(tmp_path / "file", "new")
        assert {path.name for path in tmp_path.iterdir()} == {"file", ".tierlm-alive", ".other"}


@both_ways
@pytest.mark.usefixtures("way")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"


@pytest.mark.parametrize("target", ["fifo", "folder"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="expected a regular file") as caught:
        write_whole(tmp_path / target, "new")
    assert caught.value.filename == str(tmp_path / target)
    assert not (tmp_path / target).is_file()


@both_ways
@pytest.mark.usefixtures("way")
def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((FileExistsError, NotADirectoryError)) as caught:
        write_whole(tmp_path / "file" / "below", "new")
    assert caught.value.filename == str(tmp_path / "file" / "below")


# --- reading


def test_what_would_be_waited_for_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, found in {"fifo": "a FIFO", "/dev/zero": "a device", ".": "a folder"}.items():
            with pytest.raises(OSError, match=f"expected a regular file, found {found}"):
                read_regular(tmp_path / name)
        with pytest.raises(OSError, match="No such device"):
            read_regular(tmp_path / "socket")


def test_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="expected at most 4 bytes"):
        read_regular(tmp_path / "file", 4)


@pytest.mark.parametrize("how", ["replaced", "written", "appended"])
def test_another_file_than_expected_is_refused(tmp_path: Path, how: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    os.utime(file, ns=(0, 1_000))
    fd = open_regular(file)
    expected = Stamp.of(fd)
    os.close(fd)
    os.close(open_regular(file, expected=expected))
    if how == "replaced":
        (tmp_path / "other").write_bytes(b"new")
        os.utime(tmp_path / "other", ns=(0, 1_000))  # as a copy that keeps times has it
        os.replace(tmp_path / "other", file)
    else:
        file.write_bytes(b"new" if how == "written" else b"old and new")
    what = {"replaced": "inode", "written": "modified 1000 before", "appended": "size 3 before, 11 now"}[how]
    with pytest.raises(OSError, match=f"changed or replaced since .*{what}"):
        open_regular(file, expected=expected)
