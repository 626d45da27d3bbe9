"""How figures are shown: tables in Markdown, and the cells that several of them have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Lines of a table, each with its end."""
    first, *others = (f"| {' | '.join(map(str, cells))} |\n" for cells in (head, *rows))
    return first + "|---" * len(head) + "|\n" + "".join(others)


def adherence_change(row: Mapping[str, Any]) -> str:
    """By how many points adherence differs from that of the first row, with the interval."""
    worse, better = row["adherence_change_interval"]
    return f"{100 * row['adherence_change']:+.1f} ({100 * worse:+.1f} to {100 * better:+.1f})"
