"""The recipes that are shipped. Oracles: the paper's numbers, written out (docs/reference.md, "Recipe"), OpenCLIP's
registry, the plan of each, and `ov2 train`'s own reading of the command in each header."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import open_clip
import pytest

from open_clip_ov2.commands.plan import make_plan
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.recipe import Augmentation, load_recipe
from open_clip_ov2.recipe.costs import Machine

CONFIGS = Path(__file__).parent.parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))
EPOCH = 1_281_167
PAPER = {  # model -> resolutions; docs/reference.md
    **{f"ov2-vit-{size}": (160, 224, 384) for size in ("ti-16", "ti-8", "s-16", "s-8", "b-16", "b-8")},
    "ov2-vit-l-14": (84, 224, 336),
    "ov2-vit-so400m-14": (84, 224, 384),
    "ov2-vit-h-14": (84, 224, 448),
    "ov2-vit-g-14": (84, 224),
}
# epochs, warm-up epochs, global batch, peak lr: docs/reference.md
STAGES = ((10_000, 40, 32_768, 1.024e-3), (800, 20, 16_384, 2.56e-5), (200, 5, 8_192, 3.2e-6))


@pytest.mark.parametrize("model", PAPER)
def test_the_papers_recipes(model: str) -> None:
    recipe = load_recipe(CONFIGS / f"{model}.toml")
    assert recipe.model == model
    assert {"beta1": 0.9, "beta2": 0.95, "wd": 0.2}.items() <= recipe.flags.items()
    assert tuple(stage.resolution for stage in recipe.stages) == PAPER[model]
    for stage, (epochs, warmup, batch, lr) in zip(recipe.stages, STAGES, strict=False):
        assert (stage.samples, stage.warmup_samples) == (epochs * EPOCH, warmup * EPOCH)
        assert stage.global_batch == batch
        assert stage.peak_lr(batch) == pytest.approx(lr)
        assert (stage.keep_ratio, stage.schedule) == ("0.35", "cosine")
        assert stage.augmentation == Augmentation((0.4, 1.0), True)


@pytest.mark.parametrize(
    ("name", "stages"),
    [  # resolution, samples, batch, peak lr, warm-up steps, text: CLIPA's own scripts and configs
        ("clipa-vit-l-14", ((84, 12_811_670_000, 65_536, 2.048e-3, 800, 8),
                            (224, 524_288_000, 32_768, 5.12e-5, 800, 32),
                            (336, 131_072_000, 16_384, 6.4e-6, 1600, 32))),
        ("clipa-vit-b-16", ((112, 2_136_000_000, 65_536, 2.048e-3, 782, 16),
                            (224, 131_072_000, 8_192, 2.56e-5, 3072, 16))),
    ],
)  # fmt: skip
def test_clipas_recipes(name: str, stages: tuple[tuple[int, ...], ...]) -> None:
    plan = make_plan(load_recipe(CONFIGS / f"{name}.toml"), Machine(gpus=8))
    for cost, (resolution, samples, batch, lr, warmup, text) in zip(plan.stages, stages, strict=True):
        assert (cost.stage.resolution, cost.stage.samples) == (resolution, samples)
        assert (cost.settings.global_batch, cost.settings.warmup_steps, cost.tokens.text) == (batch, warmup, text)
        assert cost.settings.lr == pytest.approx(lr)


def test_coca_differs_from_ov2_in_the_model_alone() -> None:
    coca, ov2 = (load_recipe(CONFIGS / f"{name}-vit-l-14.toml") for name in ("coca", "ov2"))
    assert [(s.resolution, s.samples, s.global_batch, s.base_lr, s.warmup_samples) for s in coca.stages] == [
        (s.resolution, s.samples, s.global_batch, s.base_lr, s.warmup_samples) for s in ov2.stages
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_can_run(file: Path) -> None:
    """Its model is in OpenCLIP's registry, it fits GPUs of 80 GB, and its header is a command that `ov2 train` reads
    as the plan does."""
    recipe = load_recipe(file)
    assert recipe.model in open_clip.list_models()
    header = file.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    if "ov2 train" not in header:
        assert "ov2 " in header or "bash " in header, f"{file.name}: no command in its header"
        return
    gpus = 1 if "single-gpu" in file.stem else 8
    plan = make_plan(recipe, Machine(gpus=gpus))
    for cost in plan.stages:
        assert cost.memory.of(cost.settings.batch_size) <= 80e9, f"{file.name}: {cost.stage.described()}"
    command = shlex.split(re.sub(r"\\\n#", " ", header.split("ov2 train", 1)[1]).split("\n")[0])
    place = command.index("--recipe") + 1
    assert command[place] == f"configs/{file.name}"
    command[place] = str(file)
    for cost, trained in zip(plan.stages, parse(command, world_size=gpus, gpu=True).stages, strict=True):
        settings, args = cost.settings, trained.args
        assert (settings.batch_size, settings.accum_freq) == (args.batch_size, args.accum_freq)
        assert (settings.lr, settings.warmup_steps) == (pytest.approx(args.lr), args.warmup)
        assert (settings.precision, [cost.stage.resolution]) == (args.precision, args.force_image_size)


def test_half_an_hour_on_one_gpu() -> None:
    """The quick recipe's promise, from FLOPs at 35% of an H100's ceiling and captions of 64 tokens."""
    recipe = load_recipe(CONFIGS / "quick-single-gpu.toml")
    recipe.flags["mean-caption-tokens"] = 64.0  # type: ignore[index]
    assert 0.4 < make_plan(recipe, Machine(utilisation=0.35)).hours < 0.6


def test_every_published_size_has_a_recipe() -> None:
    assert {file.stem for file in FILES} >= {
        *PAPER, "quick-single-gpu", "clipa-vit-l-14", "clipa-vit-b-16", "coca-vit-l-14",
    }  # fmt: skip
