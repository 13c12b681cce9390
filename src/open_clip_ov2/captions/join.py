"""Published captions joined to tars: three steps on disk, each of which continues where it was stopped.

1. index: the id, the url and the key of each sample of each tar, a file of JSON lines for each tar;
2. match: DuckDB finds the rows of the tables that have these ids, and then their captions, sorted by tar and sample;
   what it holds in memory is the ids of the samples, and captions only in its sort, which uses the disk;
3. write: a sidecar for each tar.

Several rows of one id: that with the sample's own url counts, then one with a caption, then the first in the order of
file names and rows. Several samples of one id all get its caption.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2 import __version__
from open_clip_ov2.captions.published import Tables, database_errors, identifier, literal
from open_clip_ov2.data.resize import in_processes
from open_clip_ov2.data.sidecars import (
    SETTINGS,
    begin_set,
    missing_sidecars,
    read_settings,
    read_sidecar,
    shard_names,
    sidecar_path,
    write_sidecar,
)
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import TEMPORARY, read_json, write_json, written_whole
from open_clip_ov2.locks import FolderLock

WORK, AUTO, REPORT = ".join", "auto", "join.json"
FOUND, NOT_FOUND, BLANK = "found", "not in the tables", "blank in the tables"
ESCAPES = re.compile(r"(?:\\x[0-9a-fA-F]{2})+")
INDEX = "{shard: 'VARCHAR', row: 'BIGINT', id: 'VARCHAR', url: 'VARCHAR'}"
CHUNK = 4096  # rows that are fetched at once
Say = Callable[[str], None]


def unescaped(text: str) -> str:
    r"""`\xc2\xae` as the sign that these bytes are in UTF-8; what is not UTF-8 stays."""

    def decoded(found: re.Match[str]) -> str:
        with contextlib.suppress(UnicodeDecodeError):
            return bytes.fromhex(found[0].replace("\\x", "")).decode("utf-8")
        return found[0]

    return ESCAPES.sub(decoded, text) if "\\x" in text else text


def sample_ids(sample: dict[str, Any]) -> dict[str, str]:
    """A sample's ids by name, of its JSON; its key in the tar stands for a key that the JSON does not have."""
    about: Any = {}
    with contextlib.suppress(ValueError):
        about = json.loads(sample.get("json", b"{}"))
    about = about if isinstance(about, dict) else {}
    found = {"key": sample["__key__"].rpartition("/")[2], **about}
    return {name: str(found[name]) for name in ("sha256", "uid", "key", "url") if found.get(name) is not None}


def index_tar(name: str, url: str, on: str, target: Path) -> tuple[str, str]:
    """Write step 1 of one tar, whole or not at all. Returns its name, and what is broken in it."""
    broken: list[str] = []
    with written_whole(target, sync=False) as file:
        for row, sample in enumerate(read_tar(url, broken.append)):
            ids = sample_ids(sample)
            line = {"shard": name, "row": row, "id": ids.get(on), "url": ids.get("url")}
            text = json.dumps(line | {"key": json.dumps(sample["__key__"])}, ensure_ascii=False)
            file.write(text.encode("utf-8", "replace") + b"\n")
    return name, "".join(broken[:1])


@dataclass
class Join:
    """`on`: a name of IDS. `unescape`: see `unescaped`. Raises UserError."""

    urls: Sequence[str]
    tables: Tables
    on: str
    folder: Path
    unescape: bool
    say: Say

    def run(self, workers: int) -> dict[str, Any]:
        """All steps for the tars that have no sidecar yet. Returns the report, which is also written."""
        self.tables.rows(self.on)  # raises before anything is written
        tables = self.tables
        begin_set(self.folder, {
            "made_by": f"ov2 captions join {__version__}", "column": tables.column, "also": list(tables.also),
            "on": self.on, "unescape": self.unescape, "files": len(tables.columns), "names": tables.digest(),
        })  # fmt: skip
        with FolderLock(self.folder):
            work = self.folder / WORK
            for unfinished in self.folder.glob(f"{TEMPORARY}*"):
                unfinished.unlink()
            left = missing_sidecars(self.folder, self.urls)
            if left:
                (work / "index").mkdir(parents=True, exist_ok=True)
                self._index(left, work / "index", workers)
                matched = self._match(sorted(left), work)
                self._write(sorted(left), work / "index", matched)
            report = self._report()
            write_json(self.folder / REPORT, report)
            shutil.rmtree(work, ignore_errors=True)
        return report

    def _index(self, left: dict[str, str], folder: Path, workers: int) -> None:
        jobs = [
            (name, url, self.on, path)
            for name, url in left.items()
            if not (path := _index_file(folder, name)).is_file()
        ]
        if jobs:
            self.say(f"step 1 of 3: reading the ids of {len(jobs)} tars")
        for name, broken in in_processes(index_tar, jobs, workers):
            if broken:
                self.say(f"warning: {left[name]} is broken ({broken}): not all of it was read")

    def _match(self, left: list[str], work: Path) -> Path:
        """The rows that were found, sorted by tar and sample; an earlier result that has these tars is used again."""
        matched, about = work / "matched.parquet", work / "matched.json"
        if matched.is_file() and about.is_file() and set(left) <= set(read_json(about, list)):
            return matched
        self.say(f"step 2 of 3: looking for them in {len(self.tables.files(self.on))} files")
        files = literal([str(_index_file(work / "index", name)) for name in left])
        index = f"read_json({files}, columns = {INDEX}, format = 'newline_delimited')"
        more = "".join(f", t.also_{place} AS {identifier(name)}" for place, name in enumerate(self.tables.also))
        temporary, rows = work / "matched.tmp", self.tables.rows(self.on)
        find = (
            "CREATE OR REPLACE TEMP TABLE found AS SELECT i.shard, i.row, t.file, t.place, "
            f"coalesce(t.row_url = i.url, false) AS same_url FROM ({rows}) t JOIN {index} i ON t.id = i.id"
        )
        fetch = (
            f"COPY (SELECT f.shard AS shard, f.row AS row, t.caption AS caption{more} "
            f"FROM ({rows}) t JOIN found f ON t.file = f.file AND t.place = f.place "
            "ORDER BY f.shard, f.row, f.same_url DESC, coalesce(trim(t.caption), '') = '', f.file, f.place) "
            f"TO {literal(str(temporary))} (FORMAT parquet, ROW_GROUP_SIZE {2 * CHUNK})"
        )
        about.unlink(missing_ok=True)
        with database_errors():
            self.tables.database.execute(f"SET temp_directory = {literal(str(work / 'spill'))}")
            for one in (find, fetch, "DROP TABLE found"):
                self.tables.database.execute(one)
        temporary.replace(matched)
        write_json(about, left)
        return matched

    def _write(self, left: list[str], index: Path, matched: Path) -> None:
        self.say(f"step 3 of 3: writing {len(left)} sidecars")
        rows = self._rows(matched)
        ahead = next(rows, None)
        for name in left:
            found: dict[int, tuple[Any, ...]] = {}
            while ahead is not None and ahead[0] <= name:
                if ahead[0] == name:
                    found.setdefault(ahead[1], ahead[2:])  # the first row of a sample counts
                ahead = next(rows, None)
            write_sidecar(sidecar_path(self.folder, name), self._lines(_index_file(index, name), found))

    def _rows(self, matched: Path) -> Iterator[tuple[Any, ...]]:
        database = self.tables.database
        with database_errors():
            database.execute("SET threads = 1")  # rows come as they are stored
            reader = database.execute(f"SELECT * FROM read_parquet({literal(str(matched))})")
            while rows := reader.fetchmany(CHUNK):
                yield from rows

    def _lines(self, index: Path, found: dict[int, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
        with open(index, encoding="utf-8") as file:
            for row, line in enumerate(map(json.loads, file)):
                key = {"key": json.loads(line["key"])}
                if line["id"] is None:
                    yield key | {"error": f"no {self.on} in the tar"}
                elif row not in found:
                    yield key | {"error": NOT_FOUND}
                elif not (found[row][0] or "").strip():
                    yield key | {"error": BLANK}
                else:
                    caption, *also = found[row]
                    caption = unescaped(caption) if self.unescape else caption
                    yield key | {"caption": caption} | dict(zip(self.tables.also, map(_plain, also), strict=True))

    def _report(self) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        for name in shard_names(self.urls):
            counts.update(line.get("error", FOUND) for line in read_sidecar(sidecar_path(self.folder, name)))
        return {"tars": len(self.urls), "samples": counts.total(), **counts, "files": len(self.tables.columns),
                "files_without_the_column": self.tables.lacking}  # fmt: skip


def _index_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it; NaN is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def chosen_id(asked: str, folder: Path, urls: Sequence[str], tables: Tables, say: Say) -> str:
    """The id to join on: the one that was asked for, or was chosen when the set was begun, or finds most of the first
    tar. Raises UserError if none finds anything."""
    if asked != AUTO:
        return asked
    if (folder / SETTINGS).is_file() and (before := read_settings(folder).get("on")):
        say(f"joined on {before}, as the set was begun")
        return str(before)
    ids = [sample_ids(sample) for sample in read_tar(urls[0], lambda problem: say(f"warning: {urls[0]}: {problem}"))]
    found = {name: _found(name, [one[name] for one in ids if name in one], tables) for name in tables.ids()}
    for name, count in found.items():
        have = sum(name in one for one in ids)
        say(f"{name}: {have:,} of {len(ids):,} samples of {urls[0]} have one, {count:,} are in the tables")
    best = max(found, key=lambda name: found[name], default=None)
    if best is None or not found[best]:
        raise UserError(f"--on auto: nothing of {urls[0]} is in the tables by any of {', '.join(found) or 'no column'}")
    say(f"joined on {best}")
    return best


def _found(on: str, values: Iterable[str], tables: Tables) -> int:
    """How many of the values the tables have."""
    wanted = Counter(values)
    if not wanted:
        return 0
    column, files = f"CAST({identifier(on)} AS VARCHAR)", literal(tables.files(on))
    query = (
        f"SELECT DISTINCT {column} FROM read_parquet({files}, union_by_name = true) "
        f"WHERE {column} IN (SELECT unnest({literal(list(wanted))}))"
    )
    with database_errors():
        return sum(wanted[value] for (value,) in tables.database.execute(query).fetchall())
