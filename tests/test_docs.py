"""The documents' examples run. Links are checked by `make docs`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The fenced code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> str:
    """What a script prints, in a process of its own, whose size is a user's, not that of the whole suite."""
    ended = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells, in one namespace, without Jupyter."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install tierlm[plot]")
    notebook = json.loads((DOCS / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    cells.insert(0, 'import matplotlib\nmatplotlib.use("Agg")')
    cells.append("print([stats.decode.disk_bytes_per_token for stats in sweep.values()])")
    printed = run("\n".join(cells), tmp_path)
    assert "\nTrue\n" in printed and "belady" in printed  # the same logits; the simulation
    found = json.loads(printed.splitlines()[-1])
    assert len(found) == 5 and found[0] > found[-1]


def test_the_recipes_run(tmp_path: Path) -> None:
    """What needs no downloaded model: plans, and whatever uses the demo model."""
    text = "".join(blocks("recipes.md", "")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("tierlm ")]
    chosen = [words for words in commands if words[1] == "plan" or words[2].startswith("demo")]
    assert len(chosen) > 4
    for words in chosen:
        subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=True, capture_output=True)
    (example,) = (block for block in blocks("recipes.md", "python") if '"demo"' in block)
    run(f"{example}\nassert len(texts) == 4 and [result.text for result in results] == texts[:3]", tmp_path)
