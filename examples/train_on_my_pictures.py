"""Train a model on a folder of pictures, each with its caption in a text file beside it, and caption held-out ones.

    python examples/train_on_my_pictures.py my_pictures
    python examples/train_on_my_pictures.py my_pictures --model ov2-vit-b-16 --resolution 112 --samples 2M

The folder holds `cat.jpg` and `cat.txt`, `sub/dog.png` and `sub/dog.txt`, and so on. The script writes a table of
pictures and captions, which `ov2 train --dataset-type csv` reads. Every tenth picture is held out. The same command
resumes a run that was stopped, and does nothing if the run is finished. For millions of pictures, pack them into tars
(webdataset), and pass those as `train_data`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import open_clip_ov2 as ov2

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="ov2-vit-nano-8")
    parser.add_argument("--resolution", type=int, default=64, help="pixels, a multiple of the patch size")
    parser.add_argument("--samples", default="20k", help="how many pictures to train on, counted with repetitions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    parser.add_argument("--out", type=Path, default=Path("logs"))
    args = parser.parse_args()

    pictures = [path for path in sorted(args.folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    pictures = [path for path in pictures if path.with_suffix(".txt").is_file()]
    if len(pictures) < 10:
        parser.error(f"{args.folder}: {len(pictures)} pictures with a caption beside them; at least 10 are needed")
    held_out, training = pictures[::10], [path for index, path in enumerate(pictures) if index % 10]
    args.out.mkdir(parents=True, exist_ok=True)
    run = ov2.train(
        {
            "model": args.model,
            "dataset_type": "csv",
            "train_data": write_table(training, args.out / "train.csv"),
            "val_data": write_table(held_out, args.out / "held-out.csv"),
            "stage": f"{args.resolution}:samples={args.samples}",
            "batch_size": args.batch_size,
            "lr": 1e-3,
            "warmup_samples": 20 * args.batch_size,
            "workers": args.workers,
            "logs": args.out,
            "name": args.folder.resolve().name,
        }
    )
    for picture, text in ov2.caption(run, held_out[:10]):
        print(f"{Path(picture.name).name}: {text}")
    print(f"\nThe run is in {run}. Try: ov2 plot {run} --out curves.png")


def write_table(pictures: list[Path], table: Path) -> Path:
    """Columns, separator and names are the defaults of OpenCLIP's --csv-img-key, --csv-caption-key, --csv-separator."""
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for picture in pictures:
            text = picture.with_suffix(".txt").read_text(encoding="utf-8")
            writer.writerow([picture.resolve(), " ".join(text.split())])
    return table


if __name__ == "__main__":
    main()
