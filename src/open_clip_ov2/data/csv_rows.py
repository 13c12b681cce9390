"""Rows of a csv file, each read or named with its line: one bad row never takes others with it.

A quote that is never closed would swallow the rows below it into one caption. Such a row is reported by itself, and
reading starts again at the next line; a caption in quotes may still contain line breaks.
"""

from __future__ import annotations

import csv
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from open_clip_ov2.errors import UserError


class Row(NamedTuple):
    """`line` counts from 1; with a `problem`, which says why the row cannot be used, there are no `fields`."""

    line: int
    fields: tuple[str | None, ...]
    problem: str = ""


def read_lines(path: Path) -> list[str]:
    """Lines with their ends. Bytes that are not UTF-8 come through as surrogates, so that they cost their row alone.

    Raises UserError for a file in UTF-16.
    """
    with open(path, "rb") as file:
        if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
            raise UserError(f"{path}: text in UTF-16 (Excel's 'Unicode Text'); save it in UTF-8 (Excel's 'CSV UTF-8')")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # -sig: Excel writes a mark
        return file.readlines()


def rows(lines: Sequence[str], separator: str, image_column: str, endings: Sequence[str]) -> Iterator[Row]:
    """The header first, then every row. `endings`: of image files, by which a swallowed row is recognized."""
    start, columns, image = 0, 0, 0
    while start < len(lines):
        reader = csv.reader((lines[i] for i in range(start, len(lines))), delimiter=separator)
        problem, fields = "", list[str]()
        try:
            fields = next(reader)
        except csv.Error as error:
            problem = str(error)
        begin, start = start, start + reader.line_num
        part = lines[begin:start]
        if not problem and _swallows(part, separator, image, columns, endings, at_end=start == len(lines)):
            problem = "a quote is opened and not closed"
        if problem:
            yield Row(begin + 1, (), problem)
            start = begin + 1
        elif fields:
            if not columns:
                columns, image = len(fields), fields.index(image_column) if image_column in fields else 0
            if len(fields) > columns:
                yield Row(begin + 1, (), f"{len(fields)} fields, and the header has {columns}")
            else:
                yield Row(begin + 1, (*fields, *[None] * (columns - len(fields))))


def _swallows(
    part: Sequence[str], separator: str, image: int, columns: int, endings: Sequence[str], *, at_end: bool
) -> bool:
    """Whether the lines of one record are several rows that a lone quote has joined."""
    if len(part) == 1:
        odd = part[0].count('"') % 2 == 1
        return at_end and odd and any(cell.startswith('"') for cell in part[0].split(separator))
    if "".join(part).count('"') % 2:
        return True
    for line in part[1:]:
        cells = line.rstrip("\r\n").split(separator)
        if len(cells) >= columns and cells[image].strip('"').lower().endswith(tuple(f".{e}" for e in endings)):
            return True
    return False
