"""Text on wide and tall paper, for the study of images that keep their shapes (scripts/aspect_study.sh).

    python scripts/aspect_data.py OUT [--train 12800] [--held-out 200] [--seed 0]
    python scripts/aspect_data.py --table OUT/eval    # the study's table, from the files of its evaluations

OUT gets webdataset shards under train/ and held-out/. `square`: a word of up to eight letters; `wide`: a word of eight
letters or more, or two words, on paper that is 3 to 6 times as wide as high; `tall`: three short words, one below the
other, on paper that is 2 to 4 times as high as wide. Held-out pictures show words that no training picture shows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import rendered_text
from PIL import Image, ImageDraw
from rendered_data import vocabulary
from sample_sets import SETTINGS, Sample, jpeg, require, reusable, write_json, write_shard

KINDS = ("square", "wide, one word", "wide, two words", "tall, three words")
SHORT_SIDE, SHARD = 48, 2000  # px of the paper's shorter side; samples in a training shard
SHORT_WORD, LONG_WORD, FILL = 5, 8, (0.8, 0.96)  # letters; share of the paper that the text fills along one side


def plan(kind: str, words: tuple[str, ...], rng: random.Random) -> tuple[tuple[int, int], list[str], list[str]]:
    """(width, height) of the paper in px, its lines, and all words of it."""
    if kind == "square":
        word = rng.choice([word for word in words if len(word) <= LONG_WORD])
        return (SHORT_SIDE, SHORT_SIDE), [word], [word]
    if kind == "tall, three words":
        short = [word for word in words if len(word) <= SHORT_WORD]
        chosen = [rng.choice(short) for _ in range(3)]
        return (SHORT_SIDE, round(SHORT_SIDE * rng.uniform(2, 4))), chosen, chosen
    if kind == "wide, one word":
        word = rng.choice([word for word in words if len(word) >= LONG_WORD])
        return (round(SHORT_SIDE * rng.uniform(3, 4.5)), SHORT_SIDE), [word], [word]
    chosen = [rng.choice([word for word in words if len(word) <= LONG_WORD]) for _ in range(2)]
    return (round(SHORT_SIDE * rng.uniform(4, 6)), SHORT_SIDE), [" ".join(chosen)], chosen


def draw(size: tuple[int, int], lines: list[str], fonts: tuple[str, ...], rng: random.Random) -> Image.Image:
    """The lines at a random place on plain paper, as large as the paper allows, or a little smaller."""
    ink, paper = rendered_text.choose_colors(rng)
    file, (width, height) = rng.choice(fonts), size
    boxes = [rendered_text.font_at(file, 40).getbbox(line) for line in lines]
    widest, step = max(box[2] - box[0] for box in boxes), 48
    scale = min(width / widest, height / (step * len(lines))) * rng.uniform(*FILL)
    font, step = rendered_text.font_at(file, max(6, round(40 * scale))), round(step * scale)
    picture = Image.new("RGB", size, paper)
    left, top = rng.uniform(0, width - widest * scale), rng.uniform(0, height - step * len(lines))
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((left, top + number * step), line, font=font, fill=ink)
    return picture


def samples(split: str, seed: int, fonts: tuple[str, ...]) -> Iterator[Sample]:
    """Without end; each depends on split, seed and number alone."""
    words, number = vocabulary(split == "held-out"), 0
    while True:
        rng = random.Random(f"{seed}/{split}/{number}")
        kind = KINDS[number % len(KINDS)]
        size, lines, said = plan(kind, words, rng)
        caption = f"the word{'s' if len(said) > 1 else ''} {' '.join(said)}"
        picture = draw(size, lines, fonts, rng)
        yield Sample(f"{split}-{number:07d}", jpeg(picture), {"kind": kind, "captions": [caption]})
        number += 1


def make(out: Path, train: int, held_out: int, seed: int) -> None:
    fonts = rendered_text.font_files(rendered_text.TRAINED_FONTS)
    for split, total in (("train", train), ("held-out", held_out * len(KINDS))):
        (out / split).mkdir(parents=True, exist_ok=True)
        rest, sizes = samples(split, seed, fonts), {}
        for start in range(0, total, SHARD):
            path = out / split / f"{start // SHARD:05d}.tar"
            sizes[path.name] = write_shard(path, islice(rest, min(SHARD, total - start)))
        write_json(out / split / "sizes.json", sizes)


def table(folder: Path) -> str:
    """Mean and deviation over the seeds of each arm, from files ARM-SEED.json of `ov2 eval`."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(path.stem.rpartition("-")[0], []).append(result["read-text"]["by_kind"])
    rows = ["| | " + " | ".join(KINDS) + " | seeds |", "|---" * (len(KINDS) + 2) + "|"]
    for arm, results in found.items():
        cells = []
        for kind in KINDS:
            exact = [100 * one[kind]["exact_match"] for one in results]
            errors = statistics.mean(one[kind]["character_error_rate"] for one in results)
            spread = f" ± {statistics.stdev(exact):.1f}" if len(exact) > 1 else ""
            cells.append(f"{statistics.mean(exact):.1f}%{spread}, {errors:.3f}")
        rows.append(f"| {arm} | {' | '.join(cells)} | {len(results)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw text on wide and tall paper.")
    parser.add_argument("out", type=Path, help="folder to make, or with --table the folder of evaluations")
    parser.add_argument("--train", type=int, default=12_800, help="pictures to train on")
    parser.add_argument("--held-out", type=int, default=200, help="pictures of each kind to test on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures")
    parser.add_argument("--table", action="store_true", help="print the table of the study")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    require("wonderwords", *rendered_text.TRAINED_FONTS)
    settings = {"train": args.train, "held_out": args.held_out, "seed": args.seed, "format": 1}
    if not reusable(args.out, settings):
        make(args.out, args.train, args.held_out, args.seed)
        write_json(args.out / SETTINGS, settings)


if __name__ == "__main__":
    main()
