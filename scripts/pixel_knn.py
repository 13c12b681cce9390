"""How well gray pixels alone tell classes apart: a floor for encoders, beside random weights.

    python scripts/pixel_knn.py TRAIN.tar TEST.tar OUT.json [--side 16] [--label label]

Each picture becomes SIDE x SIDE gray values minus their mean, so that cosine similarity is correlation. The neighbors
are those of `ov2 eval --tasks knn`, and OUT has the same form, so that a comparison shows it (`[[baseline]]`).
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from open_clip_ov2.evaluate.extraction import Features
from open_clip_ov2.evaluate.knn import knn
from open_clip_ov2.files import write_json


def features(tar: Path, side: int, label: str) -> Features:
    """Keys, labels and `(M, side * side)` float32 of a shard of pictures with JSON."""
    keys, labels, rows = [], [], []
    for sample in wds.WebDataset(str(tar), shardshuffle=False):
        with Image.open(io.BytesIO(sample["jpg"])) as picture:
            gray = picture.convert("L").resize((side, side), Image.Resampling.BOX)
        values = np.asarray(gray, np.float32).ravel()
        keys.append(sample["__key__"])
        labels.append(str(json.loads(sample["json"]).get(label) or ""))
        rows.append(values - values.mean())
    return Features(tuple(keys), tuple(labels), torch.from_numpy(np.stack(rows)), {})


def main() -> None:
    """Read both shards, classify, write and say the result."""
    parser = argparse.ArgumentParser(description="k-nearest neighbors of gray pixels: a floor for encoders.")
    parser.add_argument("train", type=Path, help="shard of the labeled pictures to compare with")
    parser.add_argument("test", type=Path, help="shard of the pictures to classify")
    parser.add_argument("out", type=Path, help="JSON as of `ov2 eval --tasks knn`")
    parser.add_argument("--side", type=int, default=16, help="pixels a side (default: 16)")
    parser.add_argument("--label", default="label", help="its name in a sample's JSON (default: label)")
    args = parser.parse_args()
    found = knn(*(features(tar, args.side, args.label) for tar in (args.train, args.test)))
    write_json(args.out, {"knn": {"top1": found["top1"], "top5": found["top5"], "n_test": found["n_test"]}})
    print(f"{args.side} x {args.side} gray pixels: top-1 {found['top1']:.1%} of {found['n_test']:,} pictures")


if __name__ == "__main__":
    main()
