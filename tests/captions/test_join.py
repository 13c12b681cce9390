"""`ov2 captions join` on made-up tables in the schema that ReCap-DataComp-1B is published in. Oracle: pandas."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from open_clip_ov2.captions.join import unescaped
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sidecars import CaptionSet, read_sidecar

V2 = "re_caption_condition_diverse_topk"


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["open_clip_ov2.commands.captions", "duckdb"])


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def table(rows: int, rng: np.random.Generator, v2: bool) -> pd.DataFrame:
    """Rows of pictures 0 to 199, several of one picture, in the published columns and types."""
    numbers = rng.integers(0, 200, rows)
    frame = pd.DataFrame(
        {
            "url": [f"https://x.org/{number % 150}/{rng.integers(3)}.jpg" for number in numbers],
            "re_caption": [f"caption {row} of picture {number}" for row, number in enumerate(numbers)],
            "org_caption": [rf"caf\xc3\xa9 {row}" for row in range(rows)],
            "sha256": list(map(digest, numbers)),
            "key": [f"{number:012d}" for number in numbers],
            "re_clip_score": rng.random(rows), "org_clip_score": rng.random(rows),
            "re_length": rng.integers(1, 99, rows), "org_length": rng.integers(1, 99, rows),
            "re_gpt4v_score": rng.integers(1, 6, rows), "org_gpt4v_score": rng.integers(1, 6, rows),
        }
    )  # fmt: skip
    if v2:
        frame[V2] = [None if row % 17 == 0 else "  " if row % 13 == 0 else f"v2 {row}" for row in range(rows)]
        frame["re_condition_length"] = rng.integers(1, 99, rows)
    return frame


def tar(path: Path, rng: np.random.Generator, samples: int) -> list[dict[str, Any]]:
    """As img2dataset and DataComp's downloader write it: KEY.jpg, KEY.txt, KEY.json."""
    found = []
    with tarfile.open(path, "w") as file:
        for row in range(samples):
            number = int(rng.integers(0, 260))
            url = f"https://x.org/{number % 150}/{rng.integers(3)}.jpg"
            about = {"uid": f"{row:032x}", "url": url, "caption": "x", "sha256": digest(number)}
            about |= {} if row % 3 == 1 else {"key": f"{number:012d}"}
            if row % 19 == 3:
                del about["sha256"]
            key = f"{path.stem}-{row:04d}"
            for suffix, data in (("jpg", b"\xff"), ("txt", b"x"), ("json", json.dumps(about).encode())):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))
            found.append({"tar": path.stem, "row": row, "key": key, **about})
    return found


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, pd.DataFrame, pd.DataFrame]:
    """Folder with recap/*.parquet, one of which lacks the column of v2, and 3 tars; all rows; all samples."""
    rng = np.random.default_rng(0)
    (tmp_path / "recap").mkdir()
    frames = []
    for number in range(4):
        frame = table(90, rng, v2=number != 2)
        frame.to_parquet(tmp_path / "recap" / f"train-{number}.parquet")
        frames.append(frame.assign(file=number, place=range(len(frame))))
    samples = [row for number in range(3) for row in tar(tmp_path / f"{number:08d}.tar", rng, 40)]
    return tmp_path, pd.concat(frames, ignore_index=True), pd.DataFrame(samples)


def expected(rows: pd.DataFrame, samples: pd.DataFrame, on: str, column: str) -> dict[tuple[str, int], str]:
    """By tar and row the caption, or why there is none, as join.py's first lines say it."""
    with_column = rows[rows["file"] != 2] if column == V2 else rows
    pairs = samples[samples[on].notna()].merge(with_column, on=on, suffixes=("", "_table"))
    pairs["other"] = pairs["url"] != pairs.get("url_table", pairs["url"])
    pairs["blank"] = pairs[column].fillna("").str.strip() == ""
    pairs = pairs.sort_values(["tar", "row", "other", "blank", "file", "place"])
    best = pairs.drop_duplicates(["tar", "row"]).set_index(["tar", "row"])
    found = {}
    for sample in samples.itertuples():
        place = (sample.tar, sample.row)
        if pd.isna(getattr(sample, on)):
            found[place] = f"no {on} in the tar"
        elif place not in best.index:
            found[place] = "not in the tables"
        else:
            found[place] = "blank in the tables" if best.loc[place, "blank"] else best.loc[place, column]
    return found


def joined(out: Path) -> dict[tuple[str, int], str]:
    return {
        (path.name.split(".")[0], row): line.get("caption") or line["error"]
        for path in sorted(out.glob("*.jsonl.gz"))
        for row, line in enumerate(read_sidecar(path))
    }


CASES = [("sha256", V2), ("key", V2), ("url", "re_caption"), ("auto", "org_caption")]


@pytest.mark.parametrize(("on", "column"), CASES)
def test_row_for_row_as_pandas_joins(
    published: tuple[Path, pd.DataFrame, pd.DataFrame], on: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows, samples = published
    command = ["captions", "join", f"{folder}/{{00000000..00000002}}.tar", "--captions", f"{folder}/recap/*.parquet"]
    command += ["--column", column, "--out", f"{folder}/out", "--also", "re_clip_score", "re_length", "--on", on]
    assert ov2([*command, "--memory-gb", "0.2", *(["--unescape"] if column == "org_caption" else [])]) == 0
    printed = capsys.readouterr()
    first = samples[samples["tar"] == "00000000"]
    rates = {name: first[name].isin(rows[name]).sum() for name in ("sha256", "key")}
    assert rates["sha256"] > rates["key"]
    wanted = expected(rows, samples, "sha256" if on == "auto" else on, column)
    if column == "org_caption":
        wanted = {place: text.replace(r"\xc3\xa9", "é") for place, text in wanted.items()}
    assert joined(folder / "out") == wanted
    lacks = f"1 of 4 files lack the column {V2}: {folder}/recap/train-2.parquet"
    assert (lacks in printed.err) == (column == V2)
    report = json.loads((folder / "out" / "join.json").read_text())
    reasons = [text for text in wanted.values() if text.endswith(("tables", "tar"))]
    assert (report["samples"], report["found"]) == (120, 120 - len(reasons))
    assert f"{reasons.count('not in the tables'):,}" in printed.out
    if on == "auto":
        have = f"samples of {folder}/00000000.tar have one"
        assert f"sha256: 38 of 40 {have}, {rates['sha256']} are in the tables" in printed.err
        assert f"key: 40 of 40 {have}, {rates['key']} are in the tables" in printed.err
    assert sorted(path.name for path in (folder / "out").iterdir() if path.name.startswith(".")) == []
    found = CaptionSet("recap", f"{folder}/out")
    tars = tuple(f"{folder}/0000000{number}.tar" for number in range(3))
    assert sum("recap" in one for one in WebDatasetSource(tars, captions=(found,)).in_order()) == 120


def test_mistakes_are_one_line(
    published: tuple[Path, pd.DataFrame, pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: what is wrong and what to do, in the message."""
    folder, *_ = published
    (folder / "damaged.parquet").write_bytes(b"PAR1")
    tar, recap, out = f"{folder}/00000000.tar", f"{folder}/recap/*.parquet", f"{folder}/out"
    cases = {
        "no such file; name parquet": ["--captions", f"{folder}/nowhere/*"],
        "unknown column 're_captoin'; did you mean re_caption?": ["--column", "re_captoin"],
        "--on, in the files of --captions: unknown column 'uid'": ["--on", "uid"],
        "--also, in the files of --captions: unknown column 'nothing'": ["--on", "key", "--also", "nothing"],
        "damaged.parquet": ["--captions", f"{folder}/*.parquet"],
        "expected one of auto": ["--on", "name"],
    }
    command = ["captions", "join", tar, "--captions", recap, "--column", V2, "--out", out]
    for message, flags in cases.items():
        assert ov2([*command, *flags]) == 2, message
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
        assert error.startswith("ov2: error: ")
    assert not Path(out).exists()
    assert ov2(command) == 0
    assert ov2([*command, "--column", "re_caption"]) == 2
    assert f"was begun with column {V2}, not re_caption" in capsys.readouterr().err


def test_killed_at_any_moment_the_same_command_goes_on(published: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    """Oracle: the bytes of a join that was not killed. SIGKILL at six moments, once it has begun."""
    folder, *_ = published
    command = ["captions", "join", f"{folder}/{{00000000..00000002}}.tar", "--captions", f"{folder}/recap/*.parquet"]
    command += ["--column", V2, "--on", "sha256", "--out"]

    def start(out: str) -> Any:
        process = SERVER.Process(target=ov2, args=([*command, f"{folder}/{out}"],))
        process.start()
        return process

    begin = time.monotonic()
    start("whole").join()
    took = time.monotonic() - begin
    for moment in range(6):
        process = start("out")
        process.join(took * (0.4 + moment / 10))
        process.kill()
        process.join()
    assert ov2([*command, f"{folder}/out"]) == 0
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()} == whole
    assert [path for path in folder.glob("out/.*") if path.name != ".lock"] == []


def test_escapes_are_undone_where_they_are_bytes_of_utf_8() -> None:
    """Oracle: written by hand."""
    assert unescaped(r"Brand\xc2\xae caf\xC3\xA9") == "Brand® café"
    assert unescaped(r"a \xff b \x41") == r"a \xff b A"
    assert unescaped("no escapes") == "no escapes"
