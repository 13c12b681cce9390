"""Every row of a csv is read, or counted with its line. Oracles: rows by hand; Python's csv reader on sound files."""

from __future__ import annotations

import csv
import io
import string
from pathlib import Path

import pytest
from broken_shards import byte_tokens, picture, to_tensor
from hypothesis import given
from hypothesis import strategies as st

from open_clip_ov2.cli import main
from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import EvalLoader
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.data.skips import BAD_ROW
from open_clip_ov2.data.sources import CsvSource, csv_lines, csv_rows
from open_clip_ov2.errors import UserError


def read(text: str, separator: str = "\t") -> list[tuple[int, tuple[str | None, ...], bool]]:
    lines = io.StringIO(text, newline="").readlines()
    return [(row.line, row.fields, bool(row.problem)) for row in csv_rows(lines, separator, "filepath")][1:]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_lone_quote_costs_its_row_alone(end: str) -> None:
    at_the_end = end.join(["filepath\ttitle", 'a.jpg\t"open', "b.jpg\tx", ""])
    assert read(at_the_end) == [(2, (), True), (3, ("b.jpg", "x"), False)]
    in_the_last_row = end.join(["filepath\ttitle", "a.jpg\tx", 'b.jpg\t"open', ""])
    assert read(in_the_last_row) == [(2, ("a.jpg", "x"), False), (3, (), True)]
    twice = ["filepath\ttitle", *(f"{n}.jpg\tcaption {n}" for n in range(12))]
    twice[3], twice[9] = '2.jpg\t"open', '8.jpg\tshut"'
    found = read(end.join([*twice, ""]))
    assert [line for line, _, bad in found if bad] == [4]
    assert [fields[0] for _, fields, bad in found if not bad] == [f"{n}.jpg" for n in range(12) if n != 2]


def test_a_caption_in_quotes_may_have_line_breaks_and_separators() -> None:
    text = 'filepath,title\na.jpg,"one, two\nthree"\n\nb.jpg,"say ""hi"" twice"\n'
    assert read(text, ",") == [(2, ("a.jpg", "one, two\nthree"), False), (5, ("b.jpg", 'say "hi" twice'), False)]


def test_a_surplus_field_is_no_caption_cut_short() -> None:
    assert read("filepath,title\na.jpg,a, b\nb.jpg,c\nc.jpg\n", ",") == [
        (2, (), True), (3, ("b.jpg", "c"), False), (4, ("c.jpg", None), False),
    ]  # fmt: skip


def test_a_field_that_is_too_long_or_has_a_nul_costs_its_row() -> None:
    text = f"filepath,title\na.jpg,{'x' * (csv.field_size_limit() + 1)}\nb.jpg,c\n"
    assert [(line, bad) for line, _, bad in read(text, ",")] == [(2, True), (3, False)]


CELLS = st.text(alphabet=string.ascii_letters + ' ,"\n', max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_sound_tables_are_read_as_csv_reads_them(table: list[tuple[str, str]]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["filepath", "title"])
    writer.writerows([(f"{number}{name}", title) for number, (name, title) in enumerate(table)])
    expected = [tuple(row) for row in csv.reader(io.StringIO(buffer.getvalue(), newline=""))][1:]
    assert [fields for _, fields, _ in read(buffer.getvalue(), ",")] == expected


def test_bad_rows_are_counted_by_the_loader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their causes stand beside those of tars, and the log names each once."""
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "table.csv").write_text('filepath,title\na.png,first\na.png,too, many\na.png,"open\na.png,last\n')
    source = CsvSource(tmp_path / "table.csv", separator=",", image_column="filepath", caption_columns=("title",))
    assert source.count() == 4
    loader = EvalLoader(
        source, to_tensor, byte_tokens, batch_size=8, num_workers=0, caption_keys=parse_caption_keys("title")
    )
    (batch,) = list(loader)
    assert (batch.keys, batch.captions) == (["row 1", "row 4"], ["first", "last"])
    assert loader.skips == {BAD_ROW: 2}
    assert f"skipped row 2 in {tmp_path / 'table.csv'}: " in caplog.text


def test_encodings_that_excel_saves(tmp_path: Path) -> None:
    """Oracle: Python's codecs. UTF-8 with a mark is read, UTF-16 is named with what to do."""
    table, text = tmp_path / "table.csv", "filepath,title\na.png,caf\u00e9\n"
    table.write_text(text, encoding="utf-8-sig")
    assert "".join(csv_lines(table)) == text
    for encoding in ("utf-16", "utf-16-be"):
        table.write_bytes(("" if encoding == "utf-16" else "\ufeff").encode(encoding) + text.encode(encoding))
        with pytest.raises(UserError, match=r"table\.csv: text in UTF-16 .*; save it in UTF-8"):
            csv_lines(table)


@pytest.mark.parametrize("name", ["table.csv", "table.tsv"])
def test_a_csv_where_tars_are_expected_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what every reader of tars calls, and in a command."""
    table = tmp_path / name
    table.write_text("filepath,title\na.png,b\n")
    with pytest.raises(UserError, match="a csv, where tars are expected"):
        expand_shards(str(table))
    assert main(["shards", "resize", str(table), str(tmp_path / "out")]) == 2
    assert name in capsys.readouterr().err
