"""Tables of texts for people, the first row of which is the header."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rich.table import Table
from rich.text import Text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, without a line break at the end."""
    header, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *others))


def on_console(rows: Sequence[Sequence[str]], justify: Literal["left", "right"] = "left", **layout: Any) -> Table:
    """For a console of rich, with a `layout` of its Table. `justify`: of all columns but the first."""
    table = Table(**layout)
    header, *others = ([Text(cell) for cell in row] for row in rows)  # a str might be read as markup
    for place, title in enumerate(header):
        table.add_column(title, justify=justify if place else "left")
    for row in others:
        table.add_row(*row)
    return table
