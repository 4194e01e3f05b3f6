"""Small pieces of text that tables in reports, cards and comparisons share."""

from __future__ import annotations

from collections.abc import Sequence

NOT_MEASURED = "not measured"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Rows of cells as a Markdown table.

    >>> print(markdown_table(["a", "b"], [["1", "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\|y |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def count_span(counts: Sequence[int]) -> str:
    """`20`, or `10 to 20` where the counts differ.

    >>> count_span([20, 10, 20]), count_span([])
    ('10 to 20', 'not measured')
    """
    if not counts:
        return NOT_MEASURED
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
