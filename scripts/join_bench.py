"""Processor time and memory of `ov2 captions join` on made-up tars and tables in the published schema.

    python scripts/join_bench.py FOLDER                                  # 2 M rows, 400,000 samples
    python scripts/join_bench.py FOLDER --rows 50_000_000 --samples 1_000_000 --memory-gb 3

Tars of 10,000 samples as DataComp's downloader writes them, with pictures of 2 KB; one sample in 10 is in no table. The
join is a process of its own, whose processor time and largest resident memory are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import duckdb

SHARD, FILE, V2 = 10_000, 500_000, "re_caption_condition_diverse_topk"
PICTURE = bytes(2048)
WORDS = "a wide view of the old harbour with wooden boats on green water and people walking under a bright sky"


def write_tars(folder: Path, samples: int, rows: int) -> int:
    for shard in range(samples // SHARD):
        path = folder / f"{shard:08d}.tar"
        if path.is_file():
            continue
        with tarfile.open(path.with_suffix(".tmp"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(SHARD):
                index = shard * SHARD + row
                number = (rows if index % 10 == 0 else 0) + index * 7919 % rows
                about = {
                    "uid": f"{index:032x}", "url": f"https://example.org/{number}.jpg", "caption": "alt-text",
                    "key": f"{index:012d}", "status": "success", "width": 512, "height": 512,
                    "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
                }  # fmt: skip
                for suffix, data in (("jpg", PICTURE), ("txt", b"alt-text"), ("json", json.dumps(about).encode())):
                    entry = tarfile.TarInfo(f"{index:012d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        path.with_suffix(".tmp").rename(path)
    return samples // SHARD


def write_tables(folder: Path, rows: int) -> None:
    database = duckdb.connect()
    database.execute("SET threads = 1; SET memory_limit = '1GB'")
    for begin in range(0, rows, FILE):
        path = folder / f"train-{begin // FILE:05d}.parquet"
        if path.is_file():
            continue
        database.execute(
            f"COPY (SELECT 'https://example.org/' || i || '.jpg' AS url, i || ' {WORDS}' AS re_caption, "
            f"'alt-text ' || i AS org_caption, sha256(i::VARCHAR) AS sha256, lpad(i::VARCHAR, 12, '0') AS key, "
            "random() AS re_clip_score, random() AS org_clip_score, 49 AS re_length, 10 AS org_length, "
            "3 AS re_gpt4v_score, 2 AS org_gpt4v_score, "
            f"'{WORDS} ' || i || ' {WORDS} {WORDS}' AS {V2}, 60 AS re_condition_length "
            f"FROM range({begin}, {min(rows, begin + FILE)}) t(i)) TO '{path}.tmp' (FORMAT parquet)"
        )
        os.replace(f"{path}.tmp", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--memory-gb", default="0.2")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shards = write_tars(args.folder, args.samples, args.rows)
    write_tables(args.folder, args.rows)
    out = args.folder / f"out-{time.time():.0f}"
    command = [
        sys.executable, "-m", "open_clip_ov2", "captions", "join", f"{args.folder}/{{00000000..{shards - 1:08d}}}.tar",
        "--captions", f"{args.folder}/*.parquet", "--on", "sha256", "--column", V2, "--out", str(out),
        "--memory-gb", args.memory_gb,
    ]  # fmt: skip
    begin = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    print(
        f"{args.rows:,} rows, {args.samples:,} samples: {usage.ru_utime + usage.ru_stime:.1f} s of processor time, "
        f"{time.monotonic() - begin:.0f} s by the clock, {usage.ru_maxrss / 2**20:.2f} GiB, exit status {status}"
    )


if __name__ == "__main__":
    main()
