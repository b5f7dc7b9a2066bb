"""Pages of the site that have their source elsewhere: README, CONTRIBUTING, the demo's card, the CLI, the notebook."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SOURCES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "demo.md": "tierlm/demo/README.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs, which then checks the links of all pages."""
    pages = {page: _moved(source) for page, source in SOURCES.items()}
    pages |= {"cli.md": _command_line(), "notebook.md": _notebook(ROOT / "docs" / "notebook.ipynb")}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _moved(source: str) -> str:
    """A page of the repository, with links that are right in the site."""
    text = (ROOT / source).read_text()
    for page, other in SOURCES.items():
        text = text.replace(f"]({other})", f"]({page})")
    return text.replace("](docs/", "](")


def _command_line() -> str:
    command = [
        sys.executable,
        "-m",
        "typer",
        "tierlm.cli",
        "utils",
        "docs",
        "--name",
        "tierlm",
        "--title",
        "Command line",
    ]
    made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return html.unescape(made.stdout)


def _notebook(file: Path) -> str:
    """The cells, without outputs: a test runs them."""
    parts = []
    for cell in json.loads(file.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, "[Download the notebook](notebook.ipynb)"])
