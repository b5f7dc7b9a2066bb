"""Compiled C++ libraries, called through ctypes."""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path


def find_library(folder: Path) -> Path | None:
    """The library built from a folder's C++, or None if it was not built for want of a compiler."""
    files = (folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.exists()), None)


class Field(ctypes.Structure):
    """struct Field of layout.h."""

    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64)]


def check_layout(library: ctypes.CDLL, struct: type[ctypes.Structure]) -> None:
    """Compare ``struct`` with the C++ struct of the same name, which has a LAYOUT (layout.h): names, offsets and sizes
    of the fields, and the total size. Raises ImportError if they differ, since Python would pass wrong values."""
    layout = library[f"tierlm_layout_{struct.__name__}"]
    layout.restype = ctypes.POINTER(Field)
    fields, found = layout(), list[tuple[str, int, int]]()
    while name := fields[len(found)].name:
        found.append((name.decode(), fields[len(found)].offset, fields[len(found)].size))
    places = [(name, getattr(struct, name)) for name, *_ in struct._fields_]
    expected = [(name, place.offset, place.size) for name, place in places]
    if found != expected or fields[len(found)].size != ctypes.sizeof(struct):
        differs = f"expected fields {expected}, found {found}: build tierlm's C++ again"
        raise ImportError(f"{library._name}: struct {struct.__name__}: {differs}")
