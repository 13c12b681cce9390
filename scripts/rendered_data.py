"""Make shards of rendered pictures with exact captions: text in many fonts, bar charts and colored shapes.

    python scripts/rendered_data.py OUT [--train 60000] [--held-out 300] [--fonts FOLDER] [--seed 0]

Everything comes with pip (`pip install 'open_clip_ov2[demo]'`); `python scripts/fonts.py FOLDER` brings 72 font
families from npm. OUT gets webdataset shards under short/ (text of a few letters or digits), train/ and
held-out/, each with sizes.json; a vocabulary of word pieces in tokenizer/; README.md, guess.json and settings.json.
The same settings give the same bytes, whatever --workers is; one core draws some 900 pictures a second.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import rendered_shapes
import rendered_text
from sample_sets import SETTINGS, Sample, jpeg, require, reusable, write_json, write_shard, write_vocabulary

FORMAT = 4  # raise when the same settings give other data
NEEDED = ("wonderwords", *rendered_text.TRAINED_FONTS, *rendered_text.HELD_OUT_FONTS)
SHARD = 10_000  # samples in a training shard
MIX = {"shapes": 15, "charts": 15, "words": 32, "letters": 14, "numbers": 10, "two words": 7, "mixed case": 7}
HELD_OUT = ("shapes", "charts", "short words", "words", "new words", "new fonts", "numbers", "two words", "mixed case")
SHORT_WORD = 4  # letters of short words at most
LICENSES = """\
Words: wonderwords (MIT). Fonts: DejaVu (Bitstream Vera License), Roboto (Apache-2.0), Lato, Caladea, Manrope, Hanken
Grotesk, Source Serif (OFL-1.1), and those of `scripts/fonts.py` (OFL-1.1, Apache-2.0 or UFL-1.0, as its LICENSES.txt
says)."""
README = """# Rendered pictures with captions

Made by `scripts/rendered_data.py` with {settings}.

{table}

- `shapes`, `charts`: drawn by `scripts/rendered_shapes.py`. A tenth of the combinations is held out.
- Text is drawn by `scripts/rendered_text.py`: lower-case words, strings of random letters, numbers, two words, and
  words in upper or title case (`mixed case`; captions are lower-case). `short words` have at most four letters. A tenth
  of the {words} words is held out: `new words`. `new fonts` are new words in fonts that no training picture shows.
- `label` in each picture's JSON is for probes: color and shape, how two shapes lie, how many equal ones there are,
  a chart's tallest bar, a text's first letter.
- `tokenizer/vocab.txt`: word pieces for `ov2 train --tokenizer`: letters, digits, and the longer words that the
  captions repeat. All other words are spelled by letters.
- `guess.json`: the probability that a uniform guess over a kind's captions is exactly right.

{licenses}
"""


@dataclass(frozen=True)
class Settings:
    """What the data depend on."""

    train: int
    short: int
    short_length: int  # letters or digits of the text in short/
    held_out: int  # pictures of each kind
    seed: int
    size: int
    fonts: tuple[str, ...]  # names of the trained fonts
    format: int = FORMAT


@dataclass(frozen=True)
class Job:
    """The settings, and where this machine has the fonts."""

    settings: Settings
    fonts: tuple[str, ...]
    new_fonts: tuple[str, ...]


@cache
def vocabulary(held_out: bool, longest: int = rendered_text.LONGEST_WORD) -> tuple[str, ...]:
    """The held-out or the trained words of at most so many letters."""
    return tuple(
        word
        for word in rendered_text.words()
        if len(word) <= longest and rendered_shapes.is_held_out(f"word/{word}") == held_out
    )


def draw(kind: str, split: str, job: Job, rng: random.Random) -> tuple[Any, str, str]:
    """Picture, caption and label of one sample."""
    side, held_out = job.settings.size, split == "held-out"
    if kind in ("shapes", "charts"):
        plan = rendered_shapes.plan_picture(kind, held_out, rng)
        return rendered_shapes.paint(plan, side, rng), plan.caption, plan.label
    new = kind in ("new words", "new fonts")
    lengths = {"short": job.settings.short_length, "short words": SHORT_WORD}
    longest = lengths.get(split, lengths.get(kind, rendered_text.LONGEST_WORD))
    plain = "words" if new or kind == "short words" else kind
    planned = rendered_text.plan_text(plain, vocabulary(new, longest), rng, longest)
    fonts = job.new_fonts if kind == "new fonts" else job.fonts
    return rendered_text.draw_text(planned, fonts, side, rng), planned.caption, f"text in {planned.lines[0][0].lower()}"


def make_sample(index: int, split: str, job: Job) -> Sample:
    """The index-th sample of a split; depends on nothing else than its arguments."""
    rng = random.Random(f"{job.settings.seed}/{split}/{index}")
    kind = HELD_OUT[index % len(HELD_OUT)] if split == "held-out" else rng.choices(list(MIX), list(MIX.values()))[0]
    picture, caption, label = draw(kind, split, job, rng)
    about = {"kind": kind, "label": label, "captions": [caption]}
    return Sample(f"{split}-{index:07d}", jpeg(picture), about)


def write_shards(folder: Path, total: int, samples: Iterable[Sample]) -> list[tuple[str, str]]:
    """Write shards of at most SHARD samples and return kind and caption of each sample."""
    folder.mkdir(parents=True)
    sizes, written = {}, []

    def noted(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            written.append((sample.about["kind"], sample.caption))
            yield sample

    waiting = noted(samples)
    for start in range(0, total, SHARD):
        path = folder / f"{start // SHARD:05d}.tar"
        sizes[path.name] = write_shard(path, islice(waiting, min(SHARD, total - start)))
    write_json(folder / "sizes.json", sizes)
    return written


def summary(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> str:
    """A table of the pictures and the distinct captions of each kind, with an example."""
    rows = ["| kind | train | held out | distinct captions (train, held out) | example |", "|---|---|---|---|---|"]
    counts = [Counter(kind for kind, _ in split) for split in (train, held_out)]
    for kind in (*HELD_OUT, "letters"):
        captions = [[caption for other, caption in split if other == kind] for split in (train, held_out)]
        numbers = f"{counts[0][kind]} | {counts[1][kind]} | {len(set(captions[0]))}, {len(set(captions[1]))}"
        rows.append(f"| {kind} | {numbers} | {(captions[1] + captions[0] + ['-'])[0]} |")
    return "\n".join(rows)


def write_about(root: Path, settings: Settings, table: str) -> None:
    """Write README.md, guess.json, settings.json and the vocabulary."""
    captions = {
        **rendered_shapes.distinct_captions(),
        **dict.fromkeys(("words", "mixed case"), len(vocabulary(False))),
        "short words": len(vocabulary(False, SHORT_WORD)),
        **dict.fromkeys(("new words", "new fonts"), len(vocabulary(True))),
        "two words": len(vocabulary(False)) ** 2,
        "numbers": sum(10**digits for digits in range(1, 7)),
    }
    write_json(root / "guess.json", {kind: 1 / number for kind, number in captions.items()})
    write_json(root / SETTINGS, asdict(settings))
    shown = ", ".join(f"{name} {value}" for name, value in asdict(settings).items() if name != "fonts")
    shown += f", {len(settings.fonts)} fonts"
    text = README.format(settings=shown, table=table, words=len(rendered_text.words()), licenses=LICENSES)
    (root / "README.md").write_text(text, encoding="utf-8")
    # Shorter words of the captions, such as "the" and "an", are spelled: as pieces they would be the beginning of many
    # a rendered word.
    repeated = {"word", "words", "number", *(word for word in rendered_shapes.caption_words() if len(word) > 3)}
    write_vocabulary(root / "tokenizer", repeated)


def make(root: Path, job: Job, workers: int) -> str:
    """Make the whole set in the folder and return its summary."""
    started, settings = time.monotonic(), job.settings
    totals = {"short": settings.short, "train": settings.train, "held-out": settings.held_out * len(HELD_OUT)}
    written: dict[str, list[tuple[str, str]]] = {}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for split, total in totals.items():
            pictures = pool.imap(partial(make_sample, split=split, job=job), range(total), chunksize=64)
            written[split] = write_shards(root / split, total, pictures)
            print(f"[{time.monotonic() - started:5.1f} s] {split}: {total:,} pictures written", flush=True)
    table = summary(written["short"] + written["train"], written["held-out"])
    write_about(root, settings, table)
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make shards of rendered pictures with exact captions.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=60_000, help="pictures to train on")
    parser.add_argument("--short", type=int, default=20_000, help="pictures with short text, to train on first")
    parser.add_argument("--short-length", type=int, default=3, help="letters or digits that short text has at most")
    parser.add_argument("--held-out", type=int, default=300, help="pictures of each kind to test on")
    parser.add_argument("--fonts", type=Path, help="folder with more fonts, from scripts/fonts.py")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures")
    parser.add_argument("--size", type=int, default=96, help="side of the pictures, in pixels")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the set in a temporary folder beside OUT, then rename it."""
    args = parse(argv)
    require(*NEEDED)
    out = args.out.resolve()
    fonts = rendered_text.font_files(rendered_text.TRAINED_FONTS, args.fonts)
    new_fonts = rendered_text.font_files(rendered_text.HELD_OUT_FONTS)
    names = tuple(Path(font).name for font in fonts)
    settings = Settings(args.train, args.short, args.short_length, args.held_out, args.seed, args.size, names)
    job = Job(settings, fonts, new_fonts)
    if reusable(out, asdict(settings)):
        print(f"{args.out}: already made with these settings, reused")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "set"
        table = make(made, job, args.workers)
        made.replace(out)
    print(table)


if __name__ == "__main__":
    main()
