"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], align: str = "l") -> list[str]:
    """The lines of a Markdown table.

    Args:
        headings: of the columns.
        rows: their cells; a ``|`` within is escaped.
        align: a letter a column, ``l`` or ``r``; the last one stands for all further columns.
    """
    sides = align.ljust(len(headings), align[-1])[: len(headings)]
    marks = "".join("--:|" if side == "r" else "---|" for side in sides)
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in (headings, *rows))
    lines = [f"| {' | '.join(cells)} |" for cells in escaped]
    return [lines[0].replace("|  |", "| |"), f"|{marks}", *lines[1:]]
