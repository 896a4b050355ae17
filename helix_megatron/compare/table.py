"""One model of a table for the terminal, Markdown and HTML.

A table is made of records (dictionaries) and columns. A column says where its value lies in a record: a path
such as "measured.grid.n", or a function of the record; what there is not is a dash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import rich.table

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text, and what is said of them."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    tag: str = "measured"
    """What its numbers are."""
    words: str = ""
    """Said above it."""
    style: str = ""
    """Its class in the page."""

    @property
    def key(self) -> str:
        """Its id in the page."""
        return re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-") + "-table"

    def to_rich(self, failed: Iterable[str] = (), caption: str = "") -> rich.table.Table:
        """For the terminal, under the caption or the title; rows of variants in `failed` are red."""
        shown = rich.table.Table(title=caption or self.title)
        for heading in self.headings:
            left = heading == "variant" or self.style  # a cell of words
            shown.add_column(heading, justify="left" if left else "right", no_wrap=heading == "variant")
        for row in self.rows:
            shown.add_row(*row, style="red" if row[0] in failed else None)
        return shown

    def to_plain(self) -> rich.table.Table:
        """For the terminal, without a frame; the first column is words."""
        shown = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, heading in enumerate(self.headings):
            shown.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def to_markdown(self) -> list[str]:
        every = (self.headings, ["---"] * len(self.headings), *self.rows)
        return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in every]


@dataclass(frozen=True)
class Column:
    """One column of a table of records."""

    heading: str
    value: str | Callable[[Record], Any]
    form: str = "{}"
    factor: float = 1

    def format_cell(self, record: Record) -> str:
        """A number in `form`, times `factor`; of a summary "24.5 ± 0.3": mean, half its interval."""
        value = self.value(record) if callable(self.value) else look_up(record, self.value)
        if isinstance(value, dict):
            said = self.form.format(value["mean"] * self.factor)
            half = None if value["ci95"] is None else (value["ci95"][1] - value["mean"]) * abs(self.factor)
            return said if half is None else f"{said} ± {self.form.format(half)}"
        if value is None or isinstance(value, str):
            return value or "-"
        return self.form.format(value * self.factor)


def look_up(record: Record, path: str) -> Any:
    """The value at "key.key.key"; None where a key is missing."""
    return reduce(lambda found, key: found.get(key) if found else None, path.split("."), record)


def tabulate(title: str, records: Iterable[Record], columns: list[Column], **more: str) -> Table:
    """A table with a row for each record."""
    rows = [[column.format_cell(record) for column in columns] for record in records]
    return Table(title, [column.heading for column in columns], rows, **more)
