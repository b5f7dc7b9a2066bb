"""The documents' examples run. Links are checked by `make docs`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The fenced code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, in one namespace, without Jupyter."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install tierlm[plot]").use("Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    namespace: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, "notebook.ipynb", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "\nTrue\n" in printed and "belady" in printed  # the same logits; the simulation
    found = [stats.decode.disk_bytes_per_token for stats in namespace["sweep"].values()]
    assert len(found) == 5 and found[0] > found[-1]


def test_the_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no downloaded model: plans, and whatever uses the demo model."""
    text = "".join(blocks("recipes.md", "")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("tierlm ")]
    chosen = [words for words in commands if words[1] == "plan" or words[2].startswith("demo")]
    assert len(chosen) > 4
    for words in chosen:
        subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    (example,) = (block for block in blocks("recipes.md", "python") if '"demo"' in block)
    exec(compile(example, "recipes.md", "exec"), namespace)
    assert len(namespace["texts"]) == 4 and [result.text for result in namespace["results"]] == namespace["texts"][:3]
