"""The direction of imports, and which modules work without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import tierlm

ROOT = Path(tierlm.__file__).parent

# From the top. A file may import from its own part and from the floors below, never from another part of its floor. A
# part is a file or a folder of tierlm/.
FLOORS: list[list[set[str]]] = [
    [{"cli", "__main__"}, {"integrations"}],
    [{"server"}, {"conversation"}, {"progress"}],
    [{"llm", "async_llm", "live", "stats"}],
    [{"answer"}],
    [{"client", "worker"}],
    [{"loading"}],
    [{"load_request"}, {"runtime"}],
    [{"engine"}, {"text"}, {"prompt"}],
    [{"models"}],
    [{"memory"}, {"profiling"}, {"templates"}],
    [{"planning"}],
    [{"tracing"}],
    [{"checkpoints"}, {"policies"}],
    [{"spec"}, {"config"}, {"timeline"}, {"host"}],
    [{"processors"}, {"attention_spec"}],
    [{"kernels"}, {"cgroups"}],
    [{"formats"}, {"errors"}, {"files"}, {"table"}, {"demo"}],
    [{"library"}],
]
# Parts that may import less than their floor allows.
ONLY = {
    "text": {"text", "templates", "checkpoints", "config", "errors", "files"},
    "templates": {"templates", "checkpoints", "errors", "files"},
    "kernels": {"kernels", "formats", "library"},
    "formats": {"formats", "errors"},
    "errors": set[str](),
    "spec": {"attention_spec"},
    "attention_spec": set[str](),
}

TORCHLESS = [
    "spec",
    "attention_spec",
    "config",
    "errors",
    "checkpoints.checkpoint",
    "models.deepseek",
    "models.catalog",
]
TORCHLESS_FOLDERS = ["formats", "policies", "planning", "profiling", "tracing"]

FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


def module_of(file: Path) -> str:
    """The dotted name below tierlm: "memory.store", "cli", "models"."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def part_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(source: str, package: list[str]) -> Iterator[str]:
    """What a file of ``package`` imports from tierlm, at any depth: names below tierlm, "" for tierlm itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["tierlm", *package][: len(package) + 2 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"tierlm.{alias.name}" for alias in node.names] if module == "tierlm" else [module]
        else:
            continue
        for name in names:
            if name == "tierlm" or name.startswith("tierlm."):
                yield name.removeprefix("tierlm").removeprefix(".")


def allowed(part: str) -> set[str]:
    """The parts that ``part`` may import."""
    for level, floor in enumerate(FLOORS):
        for own in floor:
            if part in own:
                below = {name for lower in FLOORS[level + 1 :] for group in lower for name in group}
                return ONLY.get(part, own | below)
    raise AssertionError(f"tierlm/{part} stands on no floor: give it one in FLOORS")


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_point_downwards(file: Path) -> None:
    package = list(file.relative_to(ROOT).parent.parts)
    may = allowed(part_of(module_of(file)))
    wrong = [name for name in imports_of(file.read_text(encoding="utf-8"), package) if part_of(name) not in may]
    assert not wrong, f"{file.relative_to(ROOT)} may import {sorted(may)}, and imports {wrong}"


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "cli"], ids=module_of)
def test_the_command_line_uses_nothing_private(file: Path) -> None:
    """A private name starts with an underscore, as an attribute of anything but ``self``, or imported."""
    tree = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    attributes = [node for node in tree if isinstance(node, ast.Attribute)]
    names = [node.attr for node in attributes if not (isinstance(node.value, ast.Name) and node.value.id == "self")]
    names += [alias.name for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert not [name for name in names if name.startswith("_") and not name.endswith("__")]


def test_every_part_stands_on_one_floor() -> None:
    named = [name for floor in FLOORS for group in floor for name in group]
    assert sorted(named) == sorted({part_of(module_of(file)) for file in FILES})


def test_the_check_sees_every_kind_of_import() -> None:
    source = """
import tierlm.llm
import tierlm, json
from tierlm import cli, stats
from tierlm.memory.store import Store
from . import tiers
from .transfer import Job
from ..policies import eviction
from .. import runtime
if TYPE_CHECKING:
    from tierlm.text import TextCodec
def late():
    from tierlm.checkpoints import reader
"""
    expected = ["llm", "", "cli", "stats", "memory.store", "memory", "memory.transfer", "policies", "runtime"]
    assert sorted(imports_of(source, ["memory"])) == sorted([*expected, "text", "checkpoints"])


def test_floors_are_a_table_of_what_is_below() -> None:
    """No floor may import from a higher one."""
    for upper, lower in pairwise(FLOORS):
        for high in (name for group in upper for name in group):
            assert all(high not in allowed(low) for group in lower for low in group)
    assert "profiling" not in allowed("memory") and "memory" not in allowed("profiling")


def test_modules_without_torch() -> None:
    """Modules that only plan, decide or read headers start without the seconds that torch takes."""
    found = [module_of(file) for file in FILES if part_of(module_of(file)) in TORCHLESS_FOLDERS]
    names = [f"tierlm.{name}" for name in [*TORCHLESS, *found]]
    lines = ["import importlib, sys", f"for name in {names!r}:", "    importlib.import_module(name)",
             "    assert 'torch' not in sys.modules, name + ' imports torch'"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
