"""Files that are written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tierlm.files import write_whole


def test_new_or_old_with_the_users_permissions(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    write_whole(file, "one")
    write_whole(file, "two")
    assert file.read_text() == "two"
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \udc00")  # fails after the temporary file was opened
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
