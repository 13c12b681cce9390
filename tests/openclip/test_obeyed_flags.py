"""Every preprocessing and data flag of stock OpenCLIP has its effect in pixels, captions or samples, or is refused.

What a run makes of a flag is taken from OpenCLIP's own `main` where it asks for its data. Oracles: torchvision's and
OpenCLIP's own transforms on the same image from the same seed; for data, the files that the test wrote.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import open_clip
import open_clip_train.main as open_clip_main
import pytest
import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import AugmentationCfg, image_transform
from open_clip_train.params import parse_args as open_clip_parse_args
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from training import TINY_MODEL

from open_clip_ov2 import open_model
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.samples import seeded
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.encoder import Preprocessing
from open_clip_ov2.openclip import patches
from open_clip_ov2.openclip.command import refusals
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.models.preprocess import JITTER
from open_clip_ov2.openclip.run.loaders import make_data
from open_clip_ov2.openclip.run.stage_model import StageModel

OV2 = ("--model", TINY_MODEL, "--decode", "exact")
CLIP = ("--model", "clip-of-ov2-vit-nano-8", "--force-image-size", "24")
SIZE = 24
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 95, 3), dtype=np.uint8))
BICUBIC, BILINEAR = T.InterpolationMode.BICUBIC, T.InterpolationMode.BILINEAR


class Made(NamedTuple):
    """Transforms, loaders, the model's preprocessing, and what run.json says of the stage."""

    train: Any
    val: Any
    data: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    config: dict[str, Any]

    def train_pixels(self, seed: int) -> Tensor:
        """IMAGE as the model gets it, `(3, H, W)`."""
        torch.manual_seed(seed)
        mean, std = (tuple(self.preprocess_cfg[key]) for key in ("mean", "std"))
        return Compute(torch.device("cpu"), "fp32", 1, 2, mean=mean, std=std).pixels(self.train(IMAGE)[None])[0]

    def captions(self, split: str = "train") -> list[str]:
        """Of one epoch."""
        return [caption for batch in self.data[split].dataloader for caption in batch.captions]


class _Stop(Exception):
    pass


Make = Callable[..., Made]
SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "8"]


@pytest.fixture
def make(tmp_path: Path, vocabulary: Path) -> Make:
    """Runs OpenCLIP's `main` up to where model and transforms are made and data is asked for."""

    def run(*flags: str, data: Sequence[str] = SYNTHETIC, model: Sequence[str] = OV2) -> Made:
        argv = [*model, *data, "--tokenizer", str(vocabulary), "--workers", "0", "--batch-size", "4", *flags]
        plan = parse(argv, world_size=1, gpu=False)
        stage, session = plan.stages[0], SimpleNamespace(plan=plan, checkpoint=None, world_size=1)
        built: Any = StageModel(session, stage)  # type: ignore[arg-type]
        found: list[Any] = []

        def get_data(args: Any, transforms: Any, epoch: int = 0, tokenizer: Any = None) -> None:
            found.extend((*transforms, make_data(args, transforms, tokenizer, stage.options, epoch, 60.0)))
            raise _Stop

        own: dict[str, Any] = {
            "setup_logging": lambda _: lambda *args, **kwargs: None,
            "create_model_and_transforms": built.create_model,
            "get_tokenizer": built.get_tokenizer,
            "get_data": lambda _: get_data,
            "optim": built.optim,
        }
        replacements = {where: own.get(where[1], lambda original: original) for where in patches.RUN}
        with patches.run_patches(replacements), pytest.raises(_Stop):
            open_clip_main.main([*stage.argv, "--logs", str(tmp_path), "--name", "made"])
        config: Any = plan.config
        return Made(*found, built.preprocess_cfg, config["stages"][0])

    return run


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The preprocessing that flags ask for, in torchvision's own steps. The defaults are those of ov2 models."""

    mean: Any = IMAGENET_MEAN
    std: Any = IMAGENET_STD
    interpolation: Any = BILINEAR
    size: tuple[int, int] = (SIZE, SIZE)
    scale: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[Any, ...] = ()
    resize_mode: str = "shortest"

    def train(self, seed: int) -> Tensor:
        torch.manual_seed(seed)
        crop = T.RandomResizedCrop(self.size, self.scale, self.ratio, interpolation=self.interpolation)
        return self._floats([crop, *self.jitter])

    def val(self) -> Tensor:
        height, width = self.size
        if self.resize_mode != "shortest":
            name = "bicubic" if self.interpolation is BICUBIC else "bilinear"
            steps = {"mean": self.mean, "std": self.std, "interpolation": name, "resize_mode": self.resize_mode}
            pixels: Tensor = image_transform(self.size, is_train=False, **steps)(IMAGE)  # type: ignore[arg-type]
            return pixels
        scale = max(height / IMAGE.height, width / IMAGE.width)
        sides = (round(IMAGE.height * scale), int(IMAGE.width * scale))
        return self._floats([T.Resize(sides, self.interpolation), T.CenterCrop(self.size)])

    def _floats(self, steps: list[Any]) -> Tensor:
        pixels: Tensor = T.Compose([*steps, T.ToTensor(), T.Normalize(self.mean, self.std)])(IMAGE)
        return pixels


def words(*values: Any) -> list[str]:
    return [str(value) for value in values]


# flag or key of --aug-cfg, flags, what they ask for
OBEYED = [
    ("image_mean", ["--image-mean", *words(*OPENAI_DATASET_MEAN)], Pixels(mean=OPENAI_DATASET_MEAN)),
    ("image_std", ["--image-std", *words(*OPENAI_DATASET_STD)], Pixels(std=OPENAI_DATASET_STD)),
    ("image_interpolation", ["--image-interpolation", "bicubic"], Pixels(interpolation=BICUBIC)),
    (
        "image_interpolation",
        ["--image-interpolation", "bicubic", "--force-image-size", "16", "32"],
        Pixels(interpolation=BICUBIC, size=(16, 32)),
    ),
    ("image_resize_mode", ["--image-resize-mode", "squash"], Pixels(resize_mode="squash")),
    ("image_resize_mode", ["--image-resize-mode", "longest"], Pixels(resize_mode="longest")),
    ("force_image_size", ["--force-image-size", "16"], Pixels(size=(16, 16))),
    ("force_image_size", ["--force-image-size", "16", "32"], Pixels(size=(16, 32))),
    ("scale", ["--aug-cfg", "scale=(0.1,0.2)"], Pixels(scale=(0.1, 0.2))),
    ("ratio", ["--aug-cfg", "ratio=(0.4,0.5)"], Pixels(ratio=(0.4, 0.5))),
    (
        "color_jitter",
        ["--aug-cfg", "color_jitter=0.4"],
        Pixels(jitter=(T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4)], 0.8),)),
    ),
    (
        "color_jitter_prob",
        ["--aug-cfg", "color_jitter=(0.4,0.4,0.4,0.1)", "color_jitter_prob=0.3"],
        Pixels(jitter=(T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.3),)),
    ),
    (
        "color_jitter_prob",
        ["--color-jitter", "--aug-cfg", "color_jitter_prob=0.0"],
        Pixels(jitter=(T.RandomApply([T.ColorJitter(*JITTER)], 0.0), T.RandomGrayscale(0.2))),
    ),
    ("gray_scale_prob", ["--aug-cfg", "gray_scale_prob=0.5"], Pixels(jitter=(T.RandomGrayscale(0.5),))),
]


@pytest.mark.parametrize(("flag", "flags", "asked"), OBEYED)
def test_a_flag_is_seen_in_the_pixels(flag: str, flags: list[str], asked: Pixels, make: Make) -> None:
    """Of training and of evaluation, bit for bit, in run.json, and in the configuration that is saved and exported."""
    made, default = make(*flags), Pixels()
    train = [made.train_pixels(seed) for seed in range(8)]
    assert all(torch.equal(pixels, asked.train(seed)) for seed, pixels in enumerate(train))
    assert torch.equal(made.val(IMAGE), asked.val())
    if asked.size == default.size:  # or the row would show nothing
        others = [default.train(seed) for seed in range(8)]
        assert not torch.equal(torch.stack([*train, asked.val()]), torch.stack([*others, default.val()]))
    saved = {"mean": asked.mean, "std": asked.std, "interpolation": asked.interpolation.value}
    saved |= {"resize_mode": asked.resize_mode, "size": asked.size}
    assert {key: made.preprocess_cfg[key] for key in saved} == {
        key: type(made.preprocess_cfg[key])(value) for key, value in saved.items()
    }
    assert made.config["aug_cfg" if "--aug-cfg" in flags else flag]


def test_a_random_interpolation_is_drawn_for_each_image(make: Make) -> None:
    """Each crop is one of torchvision's two. Evaluation, and so an export, is bicubic, as in OpenCLIP."""
    made = make("--image-interpolation", "random", "--force-image-size", "16", "32")
    drawn = []
    for seed in range(12):
        pixels = made.train_pixels(seed)
        equal = [
            torch.equal(pixels, Pixels(interpolation=mode, size=(16, 32)).train(seed)) for mode in (BILINEAR, BICUBIC)
        ]
        assert sum(equal) == 1
        drawn += equal[:1]
    assert 2 < sum(drawn) < 10
    assert torch.equal(made.val(IMAGE), Pixels(interpolation=BICUBIC, size=(16, 32)).val())
    assert Preprocessing.of(made.preprocess_cfg).interpolation == "bicubic"


# keys of --aug-cfg for timm's augmentation, which OpenCLIP's own image_transform then makes
TIMM = [
    {},
    {"scale": (0.1, 0.2)},
    {"ratio": (0.4, 0.5)},
    {"color_jitter": 0.4},
    {"re_prob": 0.9},
    {"re_prob": 0.9, "re_count": 3},
]


@pytest.mark.parametrize("keys", TIMM, ids=str)
def test_timms_augmentation_is_timms(keys: dict[str, Any], make: Make) -> None:
    """With the crop's area, interpolation, mean and std of ov2 models where nothing else is asked for."""
    flags = [f"{key}={value}".replace(" ", "") for key, value in keys.items()]
    made = make("--aug-cfg", "use_timm=True", *flags, model=OV2[:2])
    theirs = image_transform(
        (SIZE, SIZE), True, IMAGENET_MEAN, IMAGENET_STD, interpolation="bilinear",
        aug_cfg={"use_timm": True, "scale": (0.4, 1.0), **keys},
    )  # fmt: skip
    for seed in range(4):
        with seeded(seed):
            found = made.train(IMAGE)
        with seeded(seed):
            assert torch.equal(found, theirs(IMAGE))


# flags with CLIP, and what OpenCLIP's image_transform is asked for
CLIPS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--image-mean", "0.5", "0.5", "0.5"], {"mean": (0.5, 0.5, 0.5)}),
    (["--image-std", "0.5", "0.5", "0.5"], {"std": (0.5, 0.5, 0.5)}),
    (["--image-interpolation", "bicubic"], {"interpolation": "bicubic"}),
    (["--image-resize-mode", "squash"], {"resize_mode": "squash"}),
    (
        ["--aug-cfg", "scale=(0.1,0.2)", "gray_scale_prob=0.5"],
        {"aug_cfg": {"scale": (0.1, 0.2), "gray_scale_prob": 0.5}},
    ),
    (
        ["--image-interpolation", "bilinear", "--aug-cfg", "use_timm=True", "re_prob=0.9"],
        {"interpolation": "bilinear", "aug_cfg": {"use_timm": True, "re_prob": 0.9}},
    ),
]


@pytest.mark.parametrize(("flags", "asked"), CLIPS)
def test_clip_keeps_openclips_own_transform(flags: list[str], asked: dict[str, Any], make: Make) -> None:
    made = make(*flags, model=CLIP)
    for is_train, transform in ((True, made.train), (False, made.val)):
        theirs = image_transform((SIZE, SIZE), is_train, **asked)
        for seed in range(4):
            with seeded(seed):
                found = transform(IMAGE)
            with seeded(seed):
                assert torch.equal(found, theirs(IMAGE))


def test_family_gives_clip_the_pixels_that_the_same_flags_give_an_ov2_model(make: Make) -> None:
    flags = ["--image-interpolation", "bicubic", "--image-std", "0.5", "0.5", "0.5", "--color-jitter"]
    flags += ["--force-image-size", "16", "32"]
    ours, clips = make(*flags), make(*flags, "--augmentation", "family", model=CLIP)
    assert all(torch.equal(ours.train_pixels(seed), clips.train_pixels(seed)) for seed in range(8))
    assert torch.equal(ours.val(IMAGE), clips.val(IMAGE))
    assert ours.preprocess_cfg == clips.preprocess_cfg


@pytest.mark.parametrize("model", [OV2, (*CLIP, "--augmentation", "family"), CLIP], ids=["ov2", "family", "clip"])
def test_images_that_are_not_square_are_evaluated_as_configured(model: Sequence[str], make: Make) -> None:
    """Oracle: torchvision's resize of the right filter. CLIP's is bicubic, so with bilinear it needs timm's crop."""
    timm = ["--aug-cfg", "use_timm=True"] if model is CLIP else []
    made = make("--force-image-size", "16", "32", "--image-interpolation", "bilinear", *timm, model=model)
    mean, std = made.preprocess_cfg["mean"], made.preprocess_cfg["std"]
    assert torch.equal(made.val(IMAGE), Pixels(mean, std, BILINEAR, (16, 32)).val())


def test_a_run_its_checkpoint_and_its_export_agree(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """A real run with values that equal OpenCLIP's defaults. Oracles: its files, and torchvision's pixels."""
    mean, std = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    flags = ["--image-mean", *words(*mean), "--image-std", *words(*std), "--image-interpolation", "bicubic"]
    data = ["--train-data", f"{squares}/train/00000.tar", "--train-num-samples", "8", "--val-data"]
    data += [f"{squares}/val/00000.tar", "--workers", "0", "--batch-size", "8", "--epochs", "1", "--warmup", "0"]
    run = tmp_path / "run"
    command = [*OV2, "--tokenizer", str(vocabulary), "--lr", "1e-3", *data, *flags, "--sample-captions", "0"]
    assert ov2(["train", *command, "--logs", str(tmp_path), "--name", "run"]) == 0
    config = json.loads((run / "run.json").read_text())["config"]["stages"][0]
    assert [config[key] for key in ("image_mean", "image_std", "image_interpolation")] == [
        *map(list, (mean, std)),
        "bicubic",
    ]
    assert ov2(["export", str(run), "--to", "open-clip"]) == 0
    asked = Pixels(mean, std, BICUBIC)
    for folder in (run, run / "export" / "open-clip"):
        saved = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
        assert [saved[key] for key in ("mean", "std", "interpolation")] == [list(mean), list(std), "bicubic"]
        loaded = open_model(folder)
        assert torch.equal(loaded.preprocess(IMAGE), asked.val())
    _, train, val = open_clip.create_model_and_transforms(f"local-dir:{run}")
    torch.manual_seed(0)
    assert torch.equal(train(IMAGE), asked.train(0))
    assert torch.equal(val(IMAGE), asked.val())


# --- data ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/00000.tar and b/00000.tar, 8 pictures each, captioned with their numbers, and the same as rows of a csv."""
    folder = tmp_path_factory.mktemp("parts")
    image = io.BytesIO()
    IMAGE.save(image, "png")
    for start, part in ((0, "a"), (8, "b")):
        (folder / part).mkdir()
        with tarfile.open(folder / part / "00000.tar", "w") as tar:
            for number in range(start, start + 8):
                for suffix, content in (("png", image.getvalue()), ("txt", f"number {number}".encode())):
                    about = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
    (folder / "image.png").write_bytes(image.getvalue())
    for name, separator, columns in (("tabs.csv", "\t", ("filepath", "title")), ("other.csv", ";", ("file", "alt"))):
        rows = [("image.png", f"{columns[1]} {number}") for number in range(8)]
        text = "\n".join(separator.join(row) for row in [columns, *rows])
        (folder / name).write_text(text + "\n")
    shutil.copyfile(folder / "tabs.csv", folder / "table.txt")
    return folder


def numbers(first: int, last: int, word: str = "number") -> list[str]:
    return [f"{word} {number}" for number in range(first, last)]


A, B, BOTH = "{parts}/a/00000.tar", "{parts}/b/00000.tar", "{parts}/a/00000.tar::{parts}/b/00000.tar"
OTHER_CSV = ["--train-data", "{parts}/other.csv", "--csv-separator", ";", "--csv-img-key", "file"]
# flags, captions of one epoch of training, of validation
SAMPLES: list[tuple[list[str], list[str], list[str] | None]] = [
    (["--train-data", A], numbers(0, 8), None),
    (["--train-data", BOTH, "--train-num-samples", "16"], numbers(0, 16), None),
    (["--train-data", A, "--val-data", B], numbers(0, 8), numbers(8, 16)),
    (["--train-data", A, "--val-data", B, "--val-num-samples", "3"], numbers(0, 8), numbers(8, 11)),
    (["--train-data", "{parts}/tabs.csv"], numbers(0, 8, "title"), None),
    (["--train-data", "{parts}/table.txt", "--dataset-type", "csv"], numbers(0, 8, "title"), None),
    ([*OTHER_CSV, "--csv-caption-key", "alt"], numbers(0, 8, "alt"), None),
    ([*OTHER_CSV, "--caption-keys", "alt"], numbers(0, 8, "alt"), None),
    (["--train-data", A, "--val-data", "{parts}/tabs.csv"], numbers(0, 8), numbers(0, 8, "title")),
    (["--dataset-type", "synthetic"], ["Dummy caption"] * 8, None),
]


def with_parts(flags: list[str], parts: Path) -> list[str]:
    return [flag.replace("{parts}", str(parts)) for flag in flags]


@pytest.mark.parametrize(("flags", "train", "val"), SAMPLES)
def test_a_flag_chooses_the_samples(
    flags: list[str], train: list[str], val: list[str] | None, make: Make, two_parts: Path
) -> None:
    made = make(data=["--train-num-samples", "8", *with_parts(flags, two_parts)])
    assert sorted(made.captions()) == sorted(train)
    assert ("val" in made.data) == (val is not None)
    if val is not None:
        assert made.captions("val") == val


def test_resampling_draws_with_replacement_by_the_factors(make: Make, two_parts: Path) -> None:
    """Oracles: the weight 0 of a part; two passes over shards without replacement show each sample twice."""
    flags = with_parts(["--train-data", BOTH, "--train-num-samples", "64"], two_parts)
    plain = Counter(make(data=flags).captions())
    assert set(plain.values()) == {4}
    resampled = Counter(make("--dataset-resampled", data=flags).captions())
    assert len(set(resampled.values())) > 1
    second = make("--dataset-resampled", "--train-data-upsampling-factors", "0::1", data=flags).captions()
    assert set(second) == set(numbers(8, 16))


def test_the_seed_sets_the_order_and_the_batch_size_the_batches(make: Make, two_parts: Path) -> None:
    flags = with_parts(["--train-data", A, "--train-num-samples", "8"], two_parts)
    one, same, other = (make("--seed", seed, data=flags).captions() for seed in ("1", "1", "2"))
    assert one == same != other
    assert [len(batch.keys) for batch in make("--batch-size", "2", data=flags).data["train"].dataloader] == [2] * 4


def test_each_worker_reads_shards_of_its_own(make: Make, two_parts: Path) -> None:
    """Oracle: with two workers, who take turns, each batch is of one tar; without, the shuffle buffer mixes both."""
    flags = with_parts(["--train-data", BOTH, "--train-num-samples", "16"], two_parts)
    tars = []
    for workers in ("0", "2"):
        loader = make("--workers", workers, data=flags).data["train"].dataloader
        tars.append([len({int(key) // 8 for key in batch.keys}) for batch in loader])
        loader.close()
    assert max(tars[0]) == 2
    assert tars[1] == [1, 1, 1, 1]


def test_a_buffer_of_one_keeps_the_order_and_large_pictures_are_left_out(make: Make, two_parts: Path) -> None:
    """IMAGE has 70 x 95 pixels."""
    flags = with_parts(["--train-data", A, "--val-data", B, "--train-num-samples", "8", "--shuffle-buffer"], two_parts)
    assert make(data=[*flags, "1"]).captions() == numbers(0, 8) != make(data=[*flags, "5"]).captions()
    assert make("--max-image-pixels", "6650", data=[*flags, "1"]).captions("val") == numbers(8, 16)
    with pytest.raises(UserError, match="8 too many pixels"):
        make("--max-image-pixels", "6649", data=[*flags, "1"]).captions("val")


def test_fast_decoding_takes_another_crop(make: Make) -> None:
    """Which has the same pixels (tests/data/test_crop.py). Oracle: whether it decodes at a reduced scale."""
    assert [make("--decode", how, model=OV2[:2]).train.fast for how in ("fast", "exact")] == [True, False]


# --- what cannot be obeyed, and whether every flag has a row ---------------------------------------------

TARS, CSV = ["--train-data", A], ["--train-data", "{parts}/tabs.csv"]
REFUSED: list[tuple[str, list[str], Sequence[str], str]] = [
    ("image_mean", ["--image-mean", "0.5"], OV2, "--image-mean: 1 numbers; expected 3"),
    ("image_mean", ["--image-mean", "123", "116", "103"], OV2, "expected a number >= 0 and <= 1"),
    ("image_std", ["--image-std", "0.2", "0", "0.2"], OV2, "--image-std: 0.0: expected a number > 0"),
    ("image_interpolation", ["--image-interpolation", "bilinear"], CLIP, "is bicubic whatever is asked for"),
    ("image_interpolation", ["--image-interpolation", "random"], CLIP, "add --aug-cfg use_timm=True"),
    ("force_image_size", ["--force-image-size", "30"], OV2, "the nearest are 24 and 32"),
    ("force_image_size", ["--force-image-size", "8", "8", "8"], OV2, "3 numbers; expected 1 or 2"),
    ("force_image_size", ["--force-image-size", "0"], OV2, "expected an integer >= 1"),
    ("aug_cfg", ["--aug-cfg", "scael=(0.4,1)"], OV2, "did you mean scale?"),
    ("aug_cfg", ["--aug-cfg", "scael=(0.4,1)"], CLIP, "did you mean scale?"),
    ("aug_cfg", ["--aug-cfg", "scale"], OV2, "--aug-cfg: expected KEY=VALUE"),
    ("aug_cfg", ["--aug-cfg", "scale=(0.4"], OV2, "--aug-cfg: expected KEY=VALUE"),
    ("scale", ["--aug-cfg", "scale=0.4"], OV2, "augmentation scale: 0.4: expected a list"),
    ("scale", ["--aug-cfg", "scale=(1.0,0.4)"], OV2, "the smaller one first"),
    ("ratio", ["--aug-cfg", "ratio=(0.5,2.0)"], CLIP, "OpenCLIP's transform ignores it; add use_timm=True"),
    ("color_jitter", ["--aug-cfg", "color_jitter=(0.4,0.4)"], OV2, "expected a number, or 3 or 4"),
    ("color_jitter", ["--aug-cfg", "color_jitter=(0.4,0.4,0.4,0.1)"], CLIP, "no effect without color_jitter_prob"),
    ("color_jitter", ["--aug-cfg", "color_jitter=0.4", "color_jitter_prob=1"], CLIP, "expects 4 numbers"),
    ("color_jitter_prob", ["--aug-cfg", "color_jitter_prob=0.8"], OV2, "no effect without color_jitter"),
    (
        "color_jitter_prob",
        ["--aug-cfg", "use_timm=True", "color_jitter_prob=0.8"],
        OV2,
        "timm's transform ignores it",
    ),
    ("gray_scale_prob", ["--aug-cfg", "use_timm=True", "gray_scale_prob=0.2"], OV2, "timm's transform ignores it"),
    ("re_prob", ["--aug-cfg", "re_prob=0.2"], OV2, "ov2's transform ignores it; add use_timm=True"),
    ("re_count", ["--aug-cfg", "use_timm=True", "re_count=2"], OV2[:2], "no effect without re_prob"),
    ("use_timm", ["--aug-cfg", "use_timm=no"], OV2, "'no': expected True or False"),
    (
        "use_timm",
        ["--aug-cfg", "use_timm=True", "--color-jitter"],
        OV2[:2],
        "--color-jitter with --aug-cfg use_timm=True",
    ),
    ("use_timm", ["--aug-cfg", "use_timm=True", "--decode", "fast"], OV2[:2], "--decode fast"),
    (
        "dataset_type",
        ["--dataset-type", "synthetic", *TARS],
        OV2,
        "generates its data, so --train-data would be ignored",
    ),
    ("dataset_resampled", ["--dataset-resampled", *CSV], OV2, "--dataset-resampled without tars"),
    (
        "train_data_upsampling_factors",
        ["--train-data-upsampling-factors", "1", *TARS],
        OV2,
        "without --dataset-resampled",
    ),
    ("train_data_upsampling_factors", ["--train-data-upsampling-factors", "1", *CSV], OV2, "without tars"),
    ("csv_separator", ["--csv-separator", "\t", *TARS], OV2, "--csv-separator without a csv"),
    ("csv_img_key", ["--csv-img-key", "filepath", *TARS], OV2, "--csv-img-key without a csv"),
    ("csv_caption_key", ["--csv-caption-key", "title", *TARS], OV2, "--csv-caption-key without a csv"),
    ("csv_caption_key", ["--csv-caption-key", "title", "--caption-keys", "title", *CSV], OV2, "give one or the other"),
    ("train_num_samples", ["--train-num-samples", "0"], OV2, "--train-num-samples: 0: expected an integer >= 1"),
    ("val_num_samples", ["--val-num-samples", "0"], OV2, "--val-num-samples: 0: expected an integer >= 1"),
    ("workers", ["--workers", "-1"], OV2, "--workers: -1: expected an integer >= 0"),
    ("imagenet_val", ["--imagenet-val", "{parts}/c"], OV2, "/c: no such folder"),
    ("imagenet_v2", ["--imagenet-v2", "{parts}/c"], CLIP, "/c: no such folder"),
    ("remote_sync", ["--remote-sync", "pipe:cat"], OV2, "cannot be written; expected a folder or one of s3:"),
    ("remote_sync_protocol", ["--remote-sync", "/runs", "--remote-sync-protocol", "s3"], OV2, "/runs is not s3://"),
    ("remote_sync_frequency", ["--remote-sync", "/runs", "--remote-sync-frequency", "0"], CLIP, "an integer >= 1"),
    ("remote_sync_frequency", ["--remote-sync-frequency", "60"], CLIP, "without --remote-sync"),
]


@pytest.mark.parametrize(("flag", "flags", "model", "why"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(
    flag: str, flags: list[str], model: Sequence[str], why: str, two_parts: Path
) -> None:
    """Before anything is made."""
    data = [] if "--train-data" in flags or "--dataset-type" in flags else SYNTHETIC
    with pytest.raises(UserError) as error:
        parse([*model, *data, *with_parts(flags, two_parts)], world_size=1, gpu=False)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", [*refusals.ALWAYS, *refusals.WITH_OV2], ids=lambda rule: rule.flags)
def test_what_the_page_of_flags_calls_refused_is_refused(rule: refusals.Rule, tmp_path: Path) -> None:
    """Also where its value is OpenCLIP's default. Oracle: the rules that docs/train_flags.md is written from."""
    for flag in rule.flags.split(", "):
        default = vars(open_clip_parse_args([]))[flag.removeprefix("--").replace("-", "_")]
        value = [] if isinstance(default, bool) else [str(tmp_path if default is None else default)]
        for model in (OV2,) if rule in refusals.WITH_OV2 else (OV2, CLIP):
            with pytest.raises(UserError) as error:
                parse([*model, *SYNTHETIC, flag, *value], world_size=1, gpu=False)
            assert str(error.value).startswith(flag)
            assert rule.why in str(error.value)


def test_what_a_model_does_anyway_can_be_asked_for(two_parts: Path) -> None:
    """OpenCLIP's usual flags of a contrastive run for OpenVision 1's pair of losses; one of them alone is refused."""
    both, ov1 = ["--local-loss", "--gather-with-grad"], ["--model", "ov1-of-ov2-vit-nano-8", "--decode", "exact"]
    assert parse([*ov1, *SYNTHETIC, *both], world_size=1, gpu=False).stages[0].args.local_loss
    for flag in both:
        with pytest.raises(UserError, match=rf"{flag} .*ov1-of-NAME always does both"):
            parse([*ov1, *SYNTHETIC, flag], world_size=1, gpu=False)
    # OpenCLIP's evaluation of CLIP is as asked, its training is not.
    validation = ["--val-data", str(two_parts / "a" / "00000.tar"), "--image-interpolation", "bilinear"]
    assert parse([*CLIP, *validation], world_size=1, gpu=False).stages[0].args.image_interpolation == "bilinear"


def test_an_error_names_its_stage_and_costs_need_no_data() -> None:
    """Errors of OpenCLIP's parser and of all checks after it; `ov2 plan` parses without data, --eval too."""
    stages = ["--stage", "16:samples=8,lr=1e-3", "--stage", "24:samples=8,lr=1e-3"]
    for flags in (["--batch-size", "x"], ["--batch-size", "0"], ["--eval-every-samples", "8"]):
        with pytest.raises(UserError, match=rf"^stage 1 \(16 px\): .*{flags[0]}"):
            parse([*OV2[:2], *stages, *flags], world_size=1, gpu=False, needs_data=False)
    plan = parse([*OV2[:2], "--eval", "--tasks caption-loss"], world_size=1, gpu=False, needs_data=False)
    assert plan.stages[0].args.val_data is None


def test_every_key_of_aug_cfg_has_a_row() -> None:
    """Oracle: the fields of OpenCLIP's AugmentationCfg. test_flag_table.py has all flags."""
    tested = {flag for flag, *_ in OBEYED + REFUSED} | {key for keys in TIMM for key in keys}
    assert {field.name for field in dataclasses.fields(AugmentationCfg)} <= tested
