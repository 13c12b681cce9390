"""Images a second of a core's time: our loader against stock OpenCLIP's, on the same shards, captions and augmentation.

    taskset -c 0 python scripts/loader_bench.py                  # makes its shards in a temporary folder
    taskset -c 0 python scripts/loader_bench.py --color-jitter --resolution 224 --train-data 'shards/{0..9}.tar'
    taskset -c 0 python scripts/loader_bench.py --caption-set     # what a set of captions costs
    taskset -c 0 python scripts/loader_bench.py --shards 16 --elastic 16x1     # and 16 streams in one data worker

Stock is `open_clip_train.data.get_data` with its own transform at the crop of ov2 models (area 40% to 100%), bicubic as
it is. All run without worker processes, one after the other in each repetition, so that what slows the machine slows
all of them. The processor's time is taken, as other programs' turns are not ours. A repetition reads every sample once;
the first one warms up and is not counted. With `--caption-set`, captions come in turns from `txt`
and from a set that has the same ones.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from open_clip_train.data import get_data
from open_clip_train.params import parse_args
from PIL import Image, ImageDraw

from open_clip_ov2.data.captions import choose_caption, parse_caption_keys
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.loader import TrainLoader
from open_clip_ov2.data.order.layout import Elastic, parse_elastic
from open_clip_ov2.data.resize import Resize, Shrink
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.sidecars import CaptionSet, begin_set, sidecar_path, write_sidecar
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.openclip.models.preprocess import COLOR_JITTER_CFG, CROP_AREA, train_crop
from open_clip_ov2.openclip.models.tokenizer import caching

SIDE, QUALITY = 512, 77  # about 64 KB each
WORDS = ("a photo shows two people near the old harbour", "wooden boats on green water under a bright sky")


def picture(number: int) -> bytes:
    """A JPEG with the spectrum of a photograph (amplitude falls with frequency) and hard edges."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 1 / SIDE
    phases = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    noise = np.fft.irfft2(phases / frequency**1.2, s=(SIDE, SIDE))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    pixels = np.clip(128 + 50 * (0.8 * noise[:1] + 0.3 * noise[1:]), 0, 255)  # one light, and colors around it
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)).astype(np.uint8))
    for _ in range(6):
        x, y, radius = rng.integers(0, SIDE), rng.integers(0, SIDE), rng.integers(10, 100)
        fill = tuple(rng.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def write_shards(folder: Path, samples: int, shards: int = 4) -> str:
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for number in range(shard * samples // shards, (shard + 1) * samples // shards):
                rng = np.random.default_rng(number)
                caption = " ".join(rng.choice(" ".join(WORDS).split(), rng.integers(20, 100)))
                tar.write({"__key__": f"{number:06d}", "jpg": picture(number), "txt": caption})
    return f"{folder}/{{0..{shards - 1}}}.tar"


def stock(shards: str, args: argparse.Namespace, samples: int) -> Callable[[], Iterator[Any]]:
    jitter = COLOR_JITTER_CFG if args.color_jitter else {}
    transform = image_transform_v2(PreprocessCfg(size=args.resolution), True, AugmentationCfg(CROP_AREA, **jitter))
    argv = ["--train-data", shards, "--train-num-samples", str(samples), "--batch-size", str(args.batch_size)]
    flags = parse_args([*argv, "--workers", "0", "--dataset-type", "webdataset"])
    flags.distributed, flags.world_size, flags.rank = False, 1, 0
    tokenizer = open_clip.SimpleTokenizer(context_length=args.context_length)
    data = get_data(flags, (transform, None), tokenizer=tokenizer)
    return lambda: iter(data["train"].dataloader)


def ours(
    shards: str, args: argparse.Namespace, samples: int, fast: bool, elastic: Elastic | None = None
) -> Callable[[], Iterator[Any]]:
    cfg = {"size": args.resolution, "interpolation": "bilinear"}
    crop = train_crop(cfg, COLOR_JITTER_CFG if args.color_jitter else None, fast)
    assert crop is not None
    loader = TrainLoader(
        WebDatasetSource(expand_shards(shards)[0]),
        crop,
        caching(open_clip.SimpleTokenizer(context_length=args.context_length)),
        batch_size=args.batch_size,
        num_workers=0,
        seed=0,
        rank=0,
        world_size=1,
        caption_keys=parse_caption_keys("txt"),
        num_samples=samples,
        elastic=elastic,
    )
    return lambda: iter(loader)


def resized(shards: str, folder: Path, short_side: int) -> str:
    with Resize(expand_shards(shards)[0], folder, Shrink(short_side, 90, MAX_IMAGE_PIXELS)) as resize:
        for _ in resize.run(workers=1):
            pass
        return "::".join(str(folder / name) for name in resize.finish())


def caption_set(shards: str, folder: Path) -> CaptionSet:
    """A set of the captions in `txt`, each with a score as the published ones have it."""
    begin_set(folder, {"made_by": "loader_bench.py"})
    for url in expand_shards(shards)[0]:
        samples = enumerate(read_tar(url, print))
        lines = ({"key": one["__key__"], "caption": one["txt"].decode(), "clip": row / 7} for row, one in samples)
        write_sidecar(sidecar_path(folder, url), lines)
    return CaptionSet("recap", str(folder))


def seconds(start: Callable[[], Iterator[Any]], samples: int) -> float:
    begin, seen = time.process_time(), 0
    for batch in start():
        seen += len(batch[0])
    assert seen == samples, f"{seen} samples came, not {samples}"
    return time.process_time() - begin


def measure(pipelines: dict[str, Callable[[], Iterator[Any]]], samples: int, repetitions: int) -> dict[str, Any]:
    """Medians of images a second, and of the ratio to stock within a repetition, with least and greatest."""
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for repetition in range(repetitions + 1):
        for name, start in pipelines.items():
            taken = seconds(start, samples)
            if repetition:
                times[name].append(taken)
    rows = {}
    for name, taken in times.items():
        ratios = [one / mine for one, mine in zip(times["stock"], taken, strict=True)]
        rows[name] = {
            "images_per_second": round(samples / statistics.median(taken), 1),
            "times_stock": round(statistics.median(ratios), 2),
            "times_stock_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return rows


def reading(source: WebDatasetSource, keys: str) -> float:
    """Seconds for reading all samples of a source, and the caption of each."""
    begin, rng, parsed = time.process_time(), random.Random(0), parse_caption_keys(keys)
    for sample in source.in_order():
        choose_caption(sample, parsed, rng)
    return time.process_time() - begin


def cost_of_set(shards: str, args: argparse.Namespace, samples: int, captions: CaptionSet) -> dict[str, float]:
    """Microseconds of an image: reading it and its caption, from txt and from the set, and the loader; the least of all
    repetitions, as other programs only add. The cost is the difference of the first two as a share of the last."""
    urls = expand_shards(shards)[0]
    from_txt, from_set = WebDatasetSource(urls), WebDatasetSource(urls, captions=(captions,))
    times: dict[str, list[float]] = {"txt": [], "set": [], "loader": []}
    for _ in range(args.repetitions):
        for _ in range(10):  # in short turns
            times["txt"].append(reading(from_txt, "txt"))
            times["set"].append(reading(from_set, f"{captions.name}:caption"))
        times["loader"].append(seconds(ours(shards, args, samples, fast=True), samples))
    found = {name: round(1e6 * min(taken) / samples, 1) for name, taken in times.items()}
    return found | {"cost": round((found["set"] - found["txt"]) / found["loader"], 4)}


def cost_of_streams(shards: str, args: argparse.Namespace, samples: int) -> dict[str, float]:
    """Microseconds of an image in the loader, without and with --elastic; the least of all repetitions."""
    loaders = {"plain": ours(shards, args, samples, True), "elastic": ours(shards, args, samples, True, args.elastic)}
    taken = [{name: seconds(start, samples) for name, start in loaders.items()} for _ in range(args.repetitions)]
    found = {name: round(1e6 * min(one[name] for one in taken) / samples, 1) for name in loaders}
    return found | {"ratio": round(found["plain"] / found["elastic"], 3)}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train-data", help="default: shards made for this, with JPEGs of 512 px")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--resolution", type=int, default=84)
    parser.add_argument("--short-side", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--color-jitter", action="store_true")
    parser.add_argument("--shards", type=int, default=4, help="that are made (default: 4)")
    parser.add_argument("--elastic", type=parse_elastic, help="these streams against one, at both sizes: 16x1")
    parser.add_argument("--caption-set", action="store_true", help="a set of captions against txt, at both sizes")
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    samples = args.samples // args.batch_size * args.batch_size
    with tempfile.TemporaryDirectory() as temporary:
        full = Path(temporary) / "full"
        full.mkdir()
        shards = args.train_data or write_shards(full, samples, args.shards)
        small = resized(shards, Path(temporary) / "small", args.short_side)
        if args.elastic:
            for name, tars in (("as they are", shards), (f"of {args.short_side} px", small)):
                print(f"shards {name}: {json.dumps(cost_of_streams(tars, args, samples))}", flush=True)
            return
        if args.caption_set:
            captions = caption_set(shards, Path(temporary) / "captions")
            for name, tars in (("as they are", shards), (f"of {args.short_side} px", small)):
                print(f"shards {name}: {json.dumps(cost_of_set(tars, args, samples, captions))}", flush=True)
            return
        pipelines = {
            "stock": stock(shards, args, samples),
            "ours, exact": ours(shards, args, samples, fast=False),
            "ours, fast": ours(shards, args, samples, fast=True),
            f"ours, shards of {args.short_side} px": ours(small, args, samples, fast=True),
            f"stock, shards of {args.short_side} px": stock(small, args, samples),
        }
        print(json.dumps(measure(pipelines, samples, args.repetitions), indent=1))


if __name__ == "__main__":
    main()
