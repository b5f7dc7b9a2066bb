"""Damaged and hostile files for hypothesis: a valid file, edited by structure or by bytes; and the limits of a case."""

from __future__ import annotations

import copy
import io
import json
import resource
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

SECONDS, BYTES = 5.0, 600 * 10**6  # of processor time and of memory for a case

DEEP = {f"deep {depth}": "[" * depth + "]" * depth for depth in (300, 900, 90_000)}  # written in place of these strings
NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**15, 2**31, 2**32, -(2**31), 2**53, 2**62, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "nan", "\0", "\ud800", "\x1b[31m", "../../x", "/", ".", "naïve 日本 🙂", "%s{}{0}"),
    *("x" * 5000, "9" * 5000, *DEEP),
    *([], {}, [[]], [None], [1, 2, 3], {"": {}}, {"x": None}, [0] * 300, {"a": 1, "b": [2]}),
]  # fmt: skip

# One edit of a JSON value: what to do, the way to the node, a value. Each number picks a child.
Edit = tuple[str, list[int], Any]
KINDS = ("replace", "replace", "replace", "delete", "rename", "add", "copy", "scale")
EDITS: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 999), min_size=1, max_size=5), st.sampled_from(NASTY)),
    min_size=1,
    max_size=3,
)
# One edit of bytes: what to do, where in millionths of the length, with which bytes.
Cut = tuple[str, int, bytes]
BLOBS = [b"\0", b"\xff", b"\x80", b"{", b'"', b"[" * 2000, b"9", b"-", b"e99", b"\0" * 8, b"\xff" * 8]
LENGTHS = [(2**power + off).to_bytes(8, "little") for power in (8, 20, 26, 31, 32, 40) for off in (-1, 0, 1)]
CUTS: st.SearchStrategy[list[Cut]] = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "insert", "cut", "drop", "repeat")),
        st.integers(0, 999_999) | st.integers(0, 300),
        st.sampled_from([*BLOBS, *LENGTHS]),
    ),
    min_size=1,
    max_size=3,
)
Damage = tuple[str, list[Any]]
DAMAGE: st.SearchStrategy[Damage] = st.one_of(EDITS.map(lambda e: ("json", e)), CUTS.map(lambda c: ("bytes", c)))


def damaged(raw: bytes, damage: Damage) -> bytes:
    """A JSON file (or a text file, which is only edited by bytes) after ``damage``."""
    kind, edits = damage
    if kind == "json":
        return dumped(edited(json.loads(raw), edits))
    return cut(raw, edits)


def dumped(value: Any) -> bytes:
    text = json.dumps(value)
    for name, deep in DEEP.items():
        text = text.replace(f'"{name}"', deep, 1)
    return text.encode()


def damaged_lines(raw: bytes, damage: Damage) -> bytes:
    """JSON lines after ``damage``, which edits the third line by structure."""
    if damage[0] == "bytes":
        return cut(raw, damage[1])
    lines = raw.split(b"\n")
    return b"\n".join([*lines[:2], damaged(lines[2], damage), *lines[3:]])


def damaged_header(raw: bytes, damage: Damage) -> bytes:
    """A safetensors file after ``damage``, of its header as JSON or of the whole file as bytes."""
    end = 8 + int.from_bytes(raw[:8], "little")
    if damage[0] == "bytes":
        return cut(raw[: end + 64], damage[1]) + raw[end + 64 :]
    header = dumped(edited(json.loads(raw[8:end]), damage[1]))
    header = header.ljust(end - 8)  # as long as before, if it fits: offsets and alignment stay
    return len(header).to_bytes(8, "little") + header + raw[end:]


def damaged_zip(raw: bytes, damage: Damage, member: int) -> bytes:
    """A zip after ``damage`` of one member, or if that is not JSON and ``member`` is even, of the zip's own bytes."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = "trace.json" if damage[0] == "json" and "trace.json" in parts else list(parts)[member % len(parts)]
    if name != "trace.json" and member % 2 == 0:
        return cut(raw, damage[1]) if damage[0] == "bytes" else raw
    if name == "trace.json" or damage[0] == "bytes":
        parts[name] = damaged(parts[name], damage)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return out.getvalue()


def edited(value: Any, edits: Sequence[Edit]) -> Any:
    """A copy of a JSON value after ``edits``; a string that holds a JSON object is edited inside."""
    value = copy.deepcopy(value)
    for kind, way, new in edits:
        _edit(value, kind, way, copy.deepcopy(new))
    return value


def _edit(node: Any, kind: str, way: Sequence[int], new: Any) -> None:
    if not isinstance(node, (dict, list)) or not node:
        return
    keys: Sequence[Any] = list(node) if isinstance(node, dict) else range(len(node))
    key = keys[way[0] % len(keys)]
    child = node[key]
    if isinstance(child, str) and child.startswith('{"') and len(way) > 1:
        inner = json.loads(child)
        _edit(inner, kind, way[1:], new)
        node[key] = json.dumps(inner)
    elif len(way) > 1 and isinstance(child, (dict, list)) and child:
        _edit(child, kind, way[1:], new)
    elif kind == "delete":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[str(new)[:6000]] = node.pop(key)
    elif kind == "add" and isinstance(node, list):
        node.extend([new] * (1 + way[0] % 3))
    elif kind == "copy":
        node[key] = copy.deepcopy(node[keys[way[-1] // 7 % len(keys)]])
    elif kind == "scale" and type(child) in (int, float):
        node[key] = (child + 1, child - 1, -child, child * 2, child * 1000, child * 10**9, str(child))[way[0] % 7]
    else:
        node[key] = new


def cut(raw: bytes, cuts: Sequence[Cut]) -> bytes:
    """``raw`` after ``cuts``."""
    for kind, place, blob in cuts:
        at = place if place <= 300 else len(raw) * place // 10**6
        if kind == "flip":
            raw = raw[:at] + bytes(byte ^ 1 << blob[0] % 8 for byte in raw[at : at + 1]) + raw[at + 1 :]
        elif kind == "set":
            raw = raw[:at] + blob + raw[at + len(blob) :]
        elif kind == "insert":
            raw = raw[:at] + blob + raw[at:]
        elif kind == "cut":
            raw = raw[:at]
        elif kind == "drop":
            raw = raw[:at] + raw[at + len(blob) :]
        else:
            raw = raw[:at] + raw[at : at + 200] * 3 + raw[at + 200 :]
    return raw


class Hang(BaseException):
    """A case took SECONDS. No ``except Exception`` hides it."""


@contextmanager
def limits(seconds: float = SECONDS) -> Iterator[None]:
    """Within the block, ``seconds`` of processor time raise Hang, and allocating a further BYTES of memory fails."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    with open("/proc/self/statm") as stream:
        data = int(stream.read().split()[5]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (data + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, before)
