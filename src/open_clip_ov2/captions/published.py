"""Published tables of captions: parquet files, read by DuckDB on disk and in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from open_clip_ov2.data import storage
from open_clip_ov2.data.retries import RetryingStore
from open_clip_ov2.errors import UserError, first_line, from_extra, unknown_key

if TYPE_CHECKING:
    import duckdb

IDS = ("sha256", "uid", "key", "url")  # what tables and tars may share, the surest first


def connect(memory_gb: float, threads: int) -> duckdb.DuckDBPyConnection:
    """A database in memory that uses at most so much of it. Raises UserError."""
    with from_extra("captions", "joining tables"):
        import duckdb
    with database_errors():
        found = duckdb.connect()
        found.execute(f"SET memory_limit = '{memory_gb * 1e9:.0f}B'")
        found.execute(f"SET threads = {threads}")
        return found


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """DuckDB's errors (a damaged file, a full disk, too little memory) as a line."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        raise UserError(f"duckdb: {first_line(error)}; finished steps are kept for the same command") from error


def literal(value: str | Sequence[str]) -> str:
    """Text, or a list of texts, as SQL has it."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "[" + ", ".join(map(literal, value)) + "]"


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class Tables:
    """Parquet files that patterns name. `column` has the captions; `also` names columns that are kept beside them.

    `columns`: names by file; `lacking`: files without the captions. Raises UserError: no file, or none with the column.
    """

    def __init__(
        self, patterns: Sequence[str], column: str, also: Sequence[str], database: duckdb.DuckDBPyConnection
    ) -> None:
        self.column, self.also, self.database = column, also, database
        files = [file for pattern in patterns for file in storage.matching(pattern)]
        if not files:
            raise UserError(f"--captions {' '.join(patterns)}: no such file; name parquet files, 'recap/*.parquet'")
        if storage.is_store(files[0]):
            database.register_filesystem(RetryingStore(files[0]))
        self.columns: dict[str, set[str]] = {file: set() for file in files}
        query = f"SELECT file_name, name FROM parquet_schema({literal(list(self.columns))}) WHERE type IS NOT NULL"
        with database_errors():
            for file, name in database.execute(query).fetchall():
                self.columns[self._own_name(file)].add(name)
        self._check(column, "--column")
        self.lacking = [file for file, names in self.columns.items() if column not in names]

    def _check(self, name: str, flag: str) -> None:
        known = set[str]().union(*self.columns.values())
        if name not in known:
            raise unknown_key(f"{flag}, in the files of --captions", name, sorted(known), "column")

    def _own_name(self, file: str) -> str:
        """DuckDB may write an address in another way than it was given."""
        if file in self.columns:
            return file
        return next(one for one in self.columns if one.endswith(file.split("://")[-1]))

    def files(self, on: str) -> list[str]:
        """Files that have the captions and the id. Raises UserError if there are none."""
        found = [file for file, names in self.columns.items() if {self.column, on} <= names]
        if not found:
            self._check(on, "--on")
            raise UserError(f"no file of --captions has both columns, {on} and {self.column}")
        return found

    def ids(self) -> list[str]:
        """Which of IDS some files have."""
        return [name for name in IDS if any({self.column, name} <= names for names in self.columns.values())]

    def rows(self, on: str) -> str:
        """A query: id, url, caption, columns of `also`, number of the file by name, and of the row."""
        files = sorted(self.files(on))
        present = set[str]().union(*(self.columns[file] for file in files))
        for name in self.also:
            self._check(name, "--also")
        url = "CAST(url AS VARCHAR)" if "url" in present else "NULL"
        kept = [identifier(name) if name in present else "NULL" for name in self.also]
        more = "".join(f", {name} AS also_{place}" for place, name in enumerate(kept))
        return (
            f"SELECT CAST({identifier(on)} AS VARCHAR) AS id, {url} AS row_url, "
            f"CAST({identifier(self.column)} AS VARCHAR) AS caption{more}, "
            "file_index AS file, file_row_number AS place "
            f"FROM read_parquet({literal(files)}, union_by_name = true, file_row_number = true)"
        )

    def digest(self) -> str:
        """Names the files, wherever they are."""
        names = sorted(file.rpartition("/")[2] for file in self.columns)
        return hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:16]
