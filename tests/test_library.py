"""The compiled libraries: where they are, and that Python and C++ agree on the structs they pass."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from tierlm.kernels import native, structs
from tierlm.library import check_layout, find_library
from tierlm.memory import compiled

WORD = ctypes.c_int64
REQUEST = compiled.Request._fields_


def request_of(fields: list[tuple[str, type]]) -> type[ctypes.Structure]:
    """A struct that pretends to be reads.cpp's Request."""
    return type("Request", (ctypes.Structure,), {"_fields_": fields})


def test_no_library_where_none_was_built(tmp_path: Path) -> None:
    assert find_library(tmp_path) is None


@pytest.mark.skipif(compiled.load() is None, reason="not built: there was no C++ compiler")
@pytest.mark.parametrize(
    "fields",
    [
        [REQUEST[1], REQUEST[0], *REQUEST[2:]],
        [*REQUEST[:-1]],
        [*REQUEST, ("more", WORD)],
        [("fd", WORD), *REQUEST[1:]],
        [("file", ctypes.c_int32), *REQUEST[1:-1], ("at", ctypes.c_int32)],
    ],
    ids=["reordered", "fewer", "more", "renamed", "narrower"],
)
def test_a_struct_that_differs_is_an_error(fields: list[tuple[str, type]]) -> None:
    libraries = compiled.load()
    assert libraries is not None
    check_layout(libraries[1], request_of([*REQUEST]))
    with pytest.raises(ImportError, match="struct Request"):
        check_layout(libraries[1], request_of(fields))


@pytest.mark.skipif(native.load() is None, reason="not built: there was no C++ compiler")
@pytest.mark.parametrize("name", ["Matrix", "Expert", "Attention", "Router"])
def test_kernels_compare_their_structs_when_they_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = find_library(Path(native.__file__).parent)
    assert file is not None
    fields = getattr(structs, name)._fields_
    monkeypatch.setattr(structs, name, type(name, (ctypes.Structure,), {"_fields_": [*fields[1:], fields[0]]}))
    with pytest.raises(ImportError, match=f"struct {name}"):
        native.Native(file)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_kernels_are_valid_on_processors_other_than_x86() -> None:
    """Installing leaves out what does not compile, without an error."""
    files = sorted(str(file) for file in Path(native.__file__).parent.glob("*.cpp"))
    assert files
    flags = ["-std=c++17", "-fsyntax-only", "-Wno-psabi", "-DTIERLM_PORTABLE"]
    done = subprocess.run(["c++", *flags, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
