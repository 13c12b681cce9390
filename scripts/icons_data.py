"""Make shards of some 280,000 icons with their names, drawn by many hands: the npm package `@iconify/json`.

    python scripts/icons_data.py OUT [--size 64] [--names-in-families 20] [--limit N] [--held-out 2000] [--seed 0]

Needs npm and `pip install 'open_clip_ov2[demo]'`. OUT gets webdataset shards, each folder with sizes.json: train/,
unseen-families/, unseen-names/, probe-train/ and probe-test/; classes.json, templates.json and guess.json for `ov2
eval`; word pieces in tokenizer/; README.md with each family's license; settings.json. Nothing but the settings decides
the bytes. A core draws some 500 icons a second; what was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from icon_names import Family, Icon, families, icons
from icon_splits import PACKAGE, PROBE_TRAINED, Plan, Settings, plan, words_of
from PIL import Image
from sample_sets import (
    SETTINGS,
    Sample,
    jpeg,
    npm_packages,
    require,
    reusable,
    write_json,
    write_shard,
    write_vocabulary,
)

SHARD = 5_000  # icons in a shard
PIECES = 3_000  # words of the captions with a word piece of their own
FLAT = 32  # gray levels: a picture with less contrast is an icon of which nothing shows
README = """# Icons with their names

Made by `scripts/icons_data.py` with {settings}, of `{package}` (npm, Iconify).

| folder | icons | families | names | what it is for |
|---|---|---|---|---|
{table}

- The caption is what the icon shows, in the words of its name; further ones (`--caption-keys json:captions`) are the
  whole name with its words of style, its other names, and its category. Logos, flags and emoji are left out.
- `label` in each picture's JSON, where it has one, is a name of one word that is among the {classes} which occur in
  most families (`classes.json`). `family` is its family, `kind` is always `icon`.
- `unseen-families`: icons of {held} families whose hands drew nothing that is trained, one of a family and name.
  `unseen-names`: icons of trained families with at least one of {words} words that no training caption has.
  `probe-train`: labeled icons of trained families, at most {trained} of a class; `probe-test`: those of unseen
  families.
- A drawing that is also in `train` stands in no set to test on.
- `guess.json`: the probability that a uniform guess over the trained names is exactly right.
- `tokenizer/vocab.txt`: word pieces for `ov2 train --tokenizer`: letters, digits and the {pieces} most frequent words.

| family | drawn by | license | set |
|---|---|---|---|
{licenses}
"""


def draw(icon: Icon, size: int) -> Image.Image | None:
    """Black or in its own colors on white, as large as fits (RGB); None if nothing of it shows."""
    import resvg_py

    box = " ".join(map(str, icon.box))
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {head} viewBox="{box}" width="{size}" height="{size}" color="#000">{icon.body}</svg>'
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#fff", skip_system_fonts=True)
    except ValueError:  # a drawing that resvg cannot read
        return None
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    darkest, brightest = picture.convert("L").getextrema()
    return picture if brightest - darkest >= FLAT else None


def make_shard(job: tuple[Path, list[Icon]], size: int) -> tuple[Path, int]:
    """Write one shard of the icons of which something shows; returns it with their number."""

    def samples() -> Iterator[Sample]:
        for icon in job[1]:
            if (picture := draw(icon, size)) is not None:
                about = {"kind": "icon", "family": icon.family, "captions": icon.captions}
                yield Sample(icon.key, jpeg(picture), {**about, **({"label": icon.label} if icon.label else {})})

    return job[0], write_shard(job[0], samples())


def make_shards(root: Path, sets: dict[str, list[Icon]], size: int, workers: int) -> None:
    """Write the shards that are not there yet, and each folder's sizes.json when it is complete."""
    noted = root / "sizes.json"  # of all shards, while some are missing
    sizes: dict[str, dict[str, int]] = json.loads(noted.read_text()) if noted.exists() else {name: {} for name in sets}
    jobs = [
        (root / name / f"{start // SHARD:05d}.tar", icons[start : start + SHARD])
        for name, icons in sets.items()
        for start in range(0, len(icons), SHARD)
    ]
    waiting = [(path, icons) for path, icons in jobs if path.name not in sizes[path.parent.name]]
    total, started, drawn = sum(len(icons) for _, icons in jobs), time.monotonic(), 0
    before = total - sum(len(icons) for _, icons in waiting)
    if before:
        print(f"{before:,} of {total:,} icons were drawn by an earlier run", flush=True)
    for name in sets:
        (root / name).mkdir(exist_ok=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(make_shard, job, size) for job in waiting]):
            path, number = future.result()
            sizes[path.parent.name][path.name] = number
            write_json(noted, sizes)
            drawn += number
            rate = drawn / (time.monotonic() - started)
            print(f"{before + drawn:,} of {total:,} icons drawn, {rate:.0f} a second", flush=True)
    for name in sets:
        write_json(root / name / "sizes.json", dict(sorted(sizes[name].items())))


def write_about(root: Path, found: dict[str, Family], plan: Plan, settings: Settings) -> str:
    """Write README.md, what `ov2 eval` reads and the vocabulary; returns the table of sets."""
    trained = plan.sets["train"]
    words = Counter(word for icon in trained for one in icon.captions for word in words_of(one) if word.isalpha())
    pieces = [word for word in sorted(words, key=lambda word: (-words[word], word)) if len(word) > 1][:PIECES]
    write_vocabulary(root / "tokenizer", pieces)
    write_json(root / "classes.json", plan.classes)
    write_json(root / "templates.json", ["{}"])
    write_json(root / "guess.json", {"icon": 1 / len({icon.name for icon in trained})})
    uses = ("to train on", "unseen hands", "unseen words", "probes", "probes and classes")
    rows = []
    for (name, chosen), use in zip(plan.sets.items(), uses, strict=True):
        number = sum(json.loads((root / name / "sizes.json").read_text()).values())
        counts = (len({icon.family for icon in chosen}), len({icon.name for icon in chosen}))
        rows.append(f"| {name} | {number:,} | {counts[0]} | {counts[1]:,} | {use} |")
    licenses = [
        f"| [{one.name}]({one.url}) (`{one.prefix}`) | {one.author} | {one.license} | "
        f"{'unseen families' if one.prefix in plan.held_families else 'train'} |"
        for one in found.values()
    ]
    shown = ", ".join(f"{name} {value}" for name, value in asdict(settings).items() if name != "package")
    text = README.format(
        settings=shown,
        package=PACKAGE,
        table="\n".join(rows),
        licenses="\n".join(licenses),
        classes=len(plan.classes),
        held=len(plan.held_families),
        words=len(plan.held_words),
        trained=PROBE_TRAINED,
        pieces=len(pieces),
    )
    (root / "README.md").write_text(text, encoding="utf-8")
    return "\n".join(rows)


def make(out: Path, package: Path, settings: Settings, workers: int) -> str:
    """Make the set in a folder beside OUT, which a later run continues, then rename it; returns the table of sets."""
    print("reading the names ...", flush=True)
    found = families(package, settings.all_licenses)
    everything = [icon for prefix in found for icon in icons(package, prefix)]
    planned = plan(found, everything, settings)
    print(f"{len(everything):,} icons of {len(found)} families, {len(planned.sets['train']):,} to train on", flush=True)
    unfinished = out.with_name(f".{out.name}-unfinished")
    noted, wanted = unfinished / SETTINGS, json.loads(json.dumps(asdict(settings)))
    if unfinished.exists() and not (noted.exists() and json.loads(noted.read_text()) == wanted):
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True, exist_ok=True)
    write_json(noted, wanted)
    make_shards(unfinished, planned.sets, settings.size, workers)
    table = write_about(unfinished, found, planned, settings)
    (unfinished / "sizes.json").unlink()
    unfinished.replace(out)
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make shards of icons with their names.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, in pixels (default: 64)")
    parser.add_argument(
        "--names-in-families", type=int, default=1, metavar="N", help="only names that occur in N families or more"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N icons to train on (default: all)")
    parser.add_argument("--held-out", type=int, default=2000, metavar="N", help="icons of each set to test on, at most")
    parser.add_argument("--held-out-families", type=int, default=40, metavar="N", help="families held out, at most")
    parser.add_argument("--all-licenses", action="store_true", help="families with share-alike and other licenses too")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is held out, and of the order")
    parser.add_argument("--package", type=Path, help=f"folder of the unpacked package (default: {PACKAGE} from npm)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Bring the package if it is not there, and make the set."""
    args = parse(argv)
    require("resvg_py")
    settings = Settings(
        **{name: value for name, value in vars(args).items() if name not in ("out", "package", "workers")}
    )
    out = args.out.resolve()
    if reusable(out, asdict(settings)):
        print(f"{args.out}: already made with these settings, reused")
        return
    with tempfile.TemporaryDirectory() as scratch:
        package = args.package
        if package is None:
            print(f"bringing {PACKAGE} ...", flush=True)
            package = npm_packages([PACKAGE], Path(scratch), "icons") / "@iconify" / "json"
        elif not (package / "collections.json").is_file():
            raise SystemExit(f"error: {package}: no collections.json in it, so it is not the package @iconify/json")
        print(make(out, package, settings, args.workers))


if __name__ == "__main__":
    main()
