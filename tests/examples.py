"""The examples of README.md and docs/: blocks of Python, and lines of commands.

As a program: writes the Python blocks to files of a folder, for mypy.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tierlm" / "demo"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language, "" if none is named, and text of each fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def python_blocks() -> dict[str, str]:
    """Name -> source. They load the demo model, with a context that ends their texts soon."""
    found = {}
    for page in PAGES:
        for number, (language, block) in enumerate(blocks(page)):
            if language == "python":
                block = re.sub(r'LLM\.load\("[^"]*"', 'LLM.load("demo", context=48', block)
                found[f"{page.stem}_{number}"] = re.sub(r'folder = ".*"', f"folder = {str(DEMO)!r}", block)
    return found


def commands() -> list[list[str]]:
    """The arguments of each ``tierlm ...`` line. Without the lines that show a syntax: "[--json]"."""
    found = []
    for page in PAGES:
        for _, block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(r"(?:\$ )?(?:\S*/)?tierlm (.*)", line):
                    words = shlex.split(match[1], comments=True)
                    found += [] if any("[" in word or "|" in word for word in words) else [words]
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    for name, source in python_blocks().items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
