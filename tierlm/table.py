"""What is shown as a table of names and values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from html import escape

WIDTH = 100  # characters of a line of text


class Table:
    """A base class: ``repr`` is a table of text, and a notebook shows one of HTML."""

    def rows(self) -> Iterable[tuple[str, str]]:
        """Names and values. A row without a name goes on from the one before."""
        raise NotImplementedError

    def __repr__(self) -> str:
        rows = list(self.rows())
        width = max(len(name) for name, _ in rows) + 2
        lines = [textwrap.fill(value, WIDTH, initial_indent=f"{name:{width}}", subsequent_indent=" " * width)
                 for name, value in rows]  # fmt: skip
        return "\n".join([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self.rows())
        return f"<table><caption>{type(self).__name__}</caption>{''.join(cells)}</table>"
