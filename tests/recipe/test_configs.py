"""The recipes that are shipped. Oracles: the paper's numbers, written out (docs/reference.md, "Recipe"), OpenCLIP's
registry, the plan of each, and `ov2 train`'s own reading of the command in each header."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import open_clip
import pytest

import open_clip_ov2 as ov2
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.recipe import load_recipe

CONFIGS = Path(__file__).parent.parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))
EPOCH = 1_281_167
PATCH_14 = ("ov2-vit-l-14", "ov2-vit-so400m-14", "ov2-vit-h-14", "ov2-vit-g-14")
PATCH_16 = tuple(f"ov2-vit-{size}" for size in ("ti-16", "ti-8", "s-16", "s-8", "b-16", "b-8"))
MODELS = {**dict.fromkeys(PATCH_14, "openvision2-patch14"), **dict.fromkeys(PATCH_16, "openvision2-patch16")}
# epochs, warm-up epochs, global batch, peak lr: docs/reference.md
STAGES = ((10_000, 40, 32_768, 1.024e-3), (800, 20, 16_384, 2.56e-5), (200, 5, 8_192, 3.2e-6))


@pytest.mark.parametrize(("name", "sizes"), [("patch14", (84, 224, 336)), ("patch16", (160, 224, 384))])
def test_the_papers_recipes(name: str, sizes: tuple[int, ...]) -> None:
    recipe = load_recipe(CONFIGS / f"openvision2-{name}.toml")
    assert {"beta1": 0.9, "beta2": 0.95, "wd": 0.2}.items() <= recipe.flags.items()
    assert tuple(stage.resolution for stage in recipe.stages) == sizes
    for stage, (epochs, warmup, batch, lr) in zip(recipe.stages, STAGES, strict=True):
        assert (stage.samples, stage.warmup_samples) == (epochs * EPOCH, warmup * EPOCH)
        assert stage.global_batch == batch
        assert stage.base_lr == pytest.approx(lr * 256 / batch)
        assert (stage.keep_ratio, stage.schedule) == ("0.35", "cosine")
        assert (stage.crop_scale, stage.color_jitter) == ((0.4, 1.0), True)


@pytest.mark.parametrize("model", MODELS)
def test_the_papers_recipes_take_every_published_size(model: str) -> None:
    """Oracle: 80 GB, and the last resolutions of docs/reference.md, which the recipe of patch 14 gives in a comment."""
    file = CONFIGS / f"{MODELS[model]}.toml"
    plan = ov2.plan(["--recipe", str(file), "--model", model], gpus=8)
    assert plan.model == model
    for cost in plan.stages:
        assert cost.memory.of(cost.batch_size) <= 80e9, cost.title
    if model == "ov2-vit-h-14":
        assert "378 for So400m/14, 448 for H/14" in file.read_text()
        at_448 = ov2.plan({"model": model, "stage": "448:samples=1,global-batch=8192,batch-size=16"}, gpus=8).stages[0]
        assert at_448.memory.of(16) <= 80e9


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
    plan = ov2.plan({"recipe": CONFIGS / f"{name}.toml"}, gpus=8)
    for cost, (resolution, samples, batch, lr, warmup, text) in zip(plan.stages, stages, strict=True):
        assert (cost.resolution, cost.samples) == (resolution, samples)
        assert (cost.global_batch, cost.warmup_steps, cost.tokens.text) == (batch, warmup, text)
        assert cost.lr == pytest.approx(lr)


def test_coca_differs_from_ov2_in_the_model_alone() -> None:
    coca, ours = (load_recipe(CONFIGS / f"{name}.toml") for name in ("coca-vit-l-14", "openvision2-patch14"))
    assert [(s.resolution, s.samples, s.global_batch, s.base_lr, s.warmup_samples) for s in coca.stages] == [
        (s.resolution, s.samples, s.global_batch, s.base_lr, s.warmup_samples) for s in ours.stages
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_can_run(file: Path) -> None:
    """Its model is in OpenCLIP's registry, it fits GPUs of 80 GB, and its header has a command that parses."""
    recipe = load_recipe(file)
    assert recipe.model in open_clip.list_models()
    header = file.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    if "ov2 train" not in header:
        assert "ov2 " in header or "bash " in header, f"{file.name}: no command in its header"
        return
    gpus = 1 if "single-gpu" in file.stem else 8
    for cost in ov2.plan({"recipe": file}, gpus).stages:
        assert cost.memory.of(cost.batch_size) <= 80e9, f"{file.name}: {cost.title}"
    command = shlex.split(re.sub(r"\\\n#", " ", header.split("ov2 train", 1)[1]).split("\n")[0])
    place = command.index("--recipe") + 1
    assert command[place] == f"configs/{file.name}"
    command[place] = str(file)
    stages = parse(command, world_size=gpus, gpu=True).stages
    assert [stage.args.force_image_size for stage in stages] == [[stage.resolution] for stage in recipe.stages]


def test_half_an_hour_on_one_gpu() -> None:
    """The quick recipe's promise, from FLOPs at 35% of an H100's ceiling and captions of 64 tokens."""
    plan = ov2.plan({"recipe": CONFIGS / "quick-single-gpu.toml"}, mfu=0.35, mean_caption_tokens=64.0)
    assert 0.4 < plan.hours < 0.6
