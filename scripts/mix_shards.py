"""Put the samples of several tars into new ones, in random order: runs that are shorter than a pass then see all kinds.

    python scripts/mix_shards.py OUT TAR... [--shard 2000] [--seed 0]

Samples keep their files; the key gets the number of its tar in front, so that equal keys stay apart.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from pathlib import Path


def samples_of(path: Path, prefix: str) -> list[list[tuple[str, bytes]]]:
    """The files of each sample of a tar, as (name, content)."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and (content := tar.extractfile(member)) is not None:
                key, _, ending = Path(member.name).name.partition(".")
                found.setdefault(key, []).append((f"{prefix}-{key}.{ending}", content.read()))
    return list(found.values())


def write(path: Path, samples: list[list[tuple[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in (file for sample in samples for file in sample):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def mix(out: Path, tars: list[Path], shard: int, seed: int) -> str:
    """Write the tars and sizes.json; returns their pattern. The last one is left out if it would be less than half."""
    samples = [one for number, tar in enumerate(tars) for one in samples_of(tar, f"{number:03d}")]
    random.Random(seed).shuffle(samples)
    out.mkdir(parents=True, exist_ok=True)
    starts = [start for start in range(0, len(samples), shard) if not start or len(samples) - start > shard // 2]
    sizes = {}
    for number, start in enumerate(starts):
        sizes[f"{number:05d}.tar"] = len(part := samples[start : start + shard])
        write(out / f"{number:05d}.tar", part)
    (out / "sizes.json").write_text(json.dumps(sizes))
    return f"{out}/{{00000..{len(sizes) - 1:05d}}}.tar" if len(sizes) > 1 else f"{out}/00000.tar"


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the samples of several tars into new ones, in random order.")
    parser.add_argument("out", type=Path, help="folder of the new tars")
    parser.add_argument("tars", type=Path, nargs="+", help="tars to take")
    parser.add_argument("--shard", type=int, default=2000, help="samples in each (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    args = parser.parse_args()
    print(mix(args.out, args.tars, args.shard, args.seed))


if __name__ == "__main__":
    main()
