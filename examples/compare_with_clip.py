"""Train an ov2 model and a CLIP with the same encoder on the same pictures, and compare what the encoders learned.

    python scripts/rendered_data.py demo/data    # text, charts and shapes (pip install '.[demo]')
    python examples/compare_with_clip.py --train-data 'demo/data/train/0000{0..5}.tar' \\
        --val-data demo/data/held-out/00000.tar --caption-keys json:captions --label-key json:label

Both see the same samples in the same order with the same crops. Then a k-nearest-neighbor classifier and a linear probe
are fitted to the frozen features of --train-data, and tested on --val-data. One seed of a small model proves little:
`ov2 compare configs/compare/own-data.toml` does this with three seeds, a search for learning rates, CoCa, and a page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip_ov2 as ov2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", required=True, help="tars; braces expand")
    parser.add_argument("--val-data", required=True, help="held-out tars")
    parser.add_argument("--caption-keys", default="txt", help="where the captions are in a sample")
    parser.add_argument("--label-key", default="cls", help="where the class is in a sample")
    parser.add_argument("--model", default="ov2-vit-nano-8")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--samples", default="8k")
    parser.add_argument("--logs", type=Path, default=Path("logs/ov2-and-clip"))
    args = parser.parse_args()

    print("model                          k-NN   linear probe")
    for model in (args.model, f"clip-of-{args.model}"):
        run = train(model, args)
        found = ov2.evaluate(
            run,
            tasks=["knn", "linear-probe"],
            data=args.val_data,
            train_data=args.train_data,
            label_key=args.label_key,
        )
        print(f"{model:<30} {found['knn']['top1']:5.1%}  {found['linear-probe']['top1']:5.1%}")


def train(model: str, args: argparse.Namespace) -> Path:
    """The run of one model; all flags but --model are equal."""
    return ov2.train(
        {
            "model": model,
            "train_data": args.train_data,
            "val_data": args.val_data,
            "caption_keys": args.caption_keys,
            "stage": f"{args.resolution}:samples={args.samples}",
            "augmentation": "family",  # the crops and the normalization of ov2 models, for CLIP too
            "batch_size": 32,
            "lr": 1e-3,
            "warmup_samples": 320,
            "workers": 0,
            "logs": args.logs,
            "name": model,
        }
    )


if __name__ == "__main__":
    main()
