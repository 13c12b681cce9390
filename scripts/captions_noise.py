"""Pictures with alt-texts as the web has them: most are true, many belong to another picture, some are file names.

    python scripts/captions_noise.py OUT TAR... [--take 3000] [--clean 0.25] [--noise 0.67] [--seed 0]

Takes pictures of scripts/rendered_data.py and scripts/icons_data.py, mixes them, and writes tars. The JSON of a sample
has `true`, its captions; `alt`, its alt-text; in the clean share, where alt-texts are known to be true, `clean`, its
captions again, and `prompt`, an alt-text as noisy as the others have, from which a captioner learns how far to
trust one.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from mix_shards import samples_of, write

KINDS = {"another picture's": 6, "a file name": 2, "the first word": 2}  # of wrong alt-texts, by weight
Files = list[tuple[str, bytes]]


def about(files: Files) -> dict[str, Any]:
    """The JSON of a sample."""
    found: dict[str, Any] = json.loads(next(content for name, content in files if name.endswith(".json")))
    return found


def alt_text(caption: str, others: list[str], noise: float, rng: random.Random) -> str:
    """The caption, or with probability `noise` something that stands in its place."""
    if rng.random() >= noise:
        return caption
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "another picture's":
        return rng.choice(others)
    return f"img {rng.randrange(10_000):04d} jpg" if kind == "a file name" else caption.split()[0]


def with_alt_text(files: Files, others: list[str], clean: float, noise: float, rng: random.Random) -> Files:
    """A sample without its txt and with another JSON."""
    found = about(files)
    true = found.pop("captions")
    found["true"], known = true, rng.random() < clean
    found["alt"] = true[0] if known else alt_text(true[0], others, noise, rng)
    if known:
        found |= {"clean": true, "prompt": alt_text(true[0], others, noise, rng)}
    picture = [(name, content) for name, content in files if not name.endswith((".json", ".txt"))]
    return [*picture, (Path(picture[0][0]).stem + ".json", json.dumps(found).encode())]


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures with alt-texts as the web has them.")
    parser.add_argument("out", type=Path, help="folder of the new tars")
    parser.add_argument("tars", type=Path, nargs="+", help="tars to take pictures from")
    parser.add_argument("--take", type=int, default=3000, help="pictures in all (default: 3000)")
    parser.add_argument("--clean", type=float, default=0.25, help="share known to be clean (default: 0.25)")
    parser.add_argument("--noise", type=float, default=0.67, help="share of wrong ones in the rest (default: 0.67)")
    parser.add_argument("--shards", type=int, default=4, help="tars to write (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    each = -(-args.take // len(args.tars))
    samples = [one for place, tar in enumerate(args.tars) for one in samples_of(tar, f"{place:03d}")[:each]]
    rng.shuffle(samples)
    others = [about(files)["captions"][0] for files in samples]
    made = [with_alt_text(files, others, args.clean, args.noise, rng) for files in samples]
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for shard in range(args.shards):
        sizes[f"{shard:05d}.tar"] = len(part := made[shard :: args.shards])
        write(args.out / f"{shard:05d}.tar", part)
    (args.out / "sizes.json").write_text(json.dumps(sizes))
    print(f"{args.out}/{{00000..{args.shards - 1:05d}}}.tar")


if __name__ == "__main__":
    main()
