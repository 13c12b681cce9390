"""Flags of stock OpenCLIP that shape the model, its optimizer and the run, of ov2 models and of CLIP: each has its
effect. test_obeyed_flags.py has those of images and samples, test_flag_table.py says which test shows which flag."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from begun import TOWERS, begin, registered
from huggingface_hub import constants
from open_clip.transformer import QuickGELU
from safetensors.torch import save_model
from training import TINY_MODEL

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.flag_checks import check_stock
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.command.run_plan import RunPlan

LR = 0.25


@pytest.fixture(scope="module")
def models(vocabulary: Path) -> Iterator[dict[str, list[str]]]:
    """Flags for each kind of model."""
    with registered():
        kinds = {name.removeprefix("tiny_"): ["--model", name] for name in TOWERS}
        yield {**kinds, "ov2": ["--model", TINY_MODEL, "--tokenizer", str(vocabulary)]}


def two_steps(begun: Any) -> list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """(group, parameter before, after) where all gradients are 1 in the first step and 2 in the second."""
    rows = [(group, p, p.detach().double().clone()) for group in begun.optimizer.param_groups for p in group["params"]]
    for gradient in (1.0, 2.0):
        for _, parameter, _ in rows:
            parameter.grad = torch.full_like(parameter, gradient)
        begun.optimizer.step()
    return [(group, before, parameter.detach().double()) for group, parameter, before in rows]


@pytest.mark.parametrize("model", ["ov2", "clip"])
def test_the_optimizer_is_as_asked(models: dict[str, list[str]], model: str, tmp_path: Path) -> None:
    """Oracles: Adam with decoupled weight decay, and gradient descent with momentum, written out."""
    flags = ["--lr", str(LR), "--beta1", "0.6", "--beta2", "0.7", "--eps", "0.5", "--wd", "0.1"]
    begun = begin(tmp_path / "adamw", *models[model], *flags, "--wd-exclude", "*.c_fc.weight")
    excluded = [p for name, p in begun.model.named_parameters() if name.endswith(".c_fc.weight")]
    plain = [p for group in begun.optimizer.param_groups if not group["weight_decay"] for p in group["params"]]
    assert excluded
    assert all(any(one is p for one in plain) for p in excluded)
    decayed = set()
    for group, before, after in two_steps(begun):
        decay, mean, square, value = group["weight_decay"], 0.0, 0.0, before
        decayed.add(decay)
        for step, gradient in ((1, 1.0), (2, 2.0)):
            mean, square = 0.6 * mean + 0.4 * gradient, 0.7 * square + 0.3 * gradient**2
            update = mean / (1 - 0.6**step) / (math.sqrt(square / (1 - 0.7**step)) + 0.5)
            value = value * (1 - LR * decay) - LR * update
        torch.testing.assert_close(after, value, atol=1e-6, rtol=1e-5)
    assert decayed == {0.0, 0.1}
    flags = ["--lr", str(LR), "--opt", "timm/momentum", "--momentum", "0.5", "--wd", "0"]
    for _, before, after in two_steps(begin(tmp_path / "momentum", *models[model], *flags)):
        torch.testing.assert_close(after, before - LR * (1 + (0.5 * 1 + 2)), atol=1e-6, rtol=1e-5)


SCHEDULES: dict[str, tuple[list[str], list[float]]] = {
    "cosine": ([], [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
    "const": (["--lr-scheduler", "const"], [1.0] * 6),
    "cooldown": (
        [
            "--lr-scheduler",
            "const-cooldown",
            "--epochs-cooldown",
            "1",
            "--lr-cooldown-end",
            "0.05",
            "--lr-cooldown-power",
            "2",
        ],
        [1.0, 1.0] + [(1 - step / 4) ** 2 * 0.8 + 0.2 for step in range(4)],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("model", ["ov2", "clip"])
def test_the_schedule_is_as_asked(models: dict[str, list[str]], model: str, name: str, tmp_path: Path) -> None:
    """Two epochs of four steps, two of them to warm up. Oracle: the formulas, in parts of the learning rate."""
    flags, parts = SCHEDULES[name]
    begun = begin(tmp_path, *models[model], "--lr", str(LR), "--epochs", "2", "--warmup", "2", *flags)
    found = [begun.scheduler(step) for step in range(8)]
    assert found == pytest.approx([LR * part for part in [0.5, 1.0, *parts]])
    assert {group["lr"] for group in begun.optimizer.param_groups} == {found[-1]}


def test_an_ov2_model_is_as_asked(models: dict[str, list[str]], tmp_path: Path) -> None:
    """Oracles: OpenCLIP's modules, and torch's own types."""
    flags = ["--force-patch-dropout", "0.25", "--force-context-length", "9", "--grad-checkpointing", "--device", "cpu"]
    model = begin(tmp_path, *models["ov2"], *flags, "--precision", "pure_bf16").model
    assert model.visual.patch_dropout.prob == 0.25
    assert model.context_length == 9
    assert model.visual.transformer.grad_checkpointing
    assert model.text_decoder.grad_checkpointing
    assert model.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_flags_of_ov2_reach_the_model_and_its_loss(models: dict[str, list[str]], tmp_path: Path) -> None:
    """What they do there is tested in tests/core. Oracles: the attributes, and the flags of OpenCLIP they stand for."""
    flags = ["--keep-ratio", "0.5", "--eval-keep-ratio", "0.75", "--fusion", "cross_attn", "--label-smoothing", "0.1"]
    flags += ["--z-loss", "1e-3", "--global-batch", "32", "--base-lr", "0.8", "--warmup-samples", "64"]
    begun = begin(tmp_path, *models["ov2"], *flags)
    model, loss, args = begun.model, begun.loss, begun.args
    assert (model.token_drop.keep_ratio.low, model.token_drop.keep_ratio.high, model.token_drop.eval_keep_ratio) == (
        0.5,
        0.5,
        0.75,
    )
    assert model.text_decoder.config.fusion == "cross_attn"
    assert (loss.label_smoothing, loss.z_loss) == (0.1, 1e-3)
    assert (args.batch_size, args.accum_freq, args.warmup) == (8, 4, 2)
    assert args.lr == pytest.approx(0.8 * 32 / 256)


def test_a_clip_model_and_its_loss_are_as_asked(models: dict[str, list[str]], tmp_path: Path) -> None:
    """Oracles: OpenCLIP's classes and attributes."""
    flags = ["--force-custom-text", "--force-quick-gelu", "--force-patch-dropout", "0.25", "--precision", "pure_bf16"]
    flags += ["--force-context-length", "9", "--grad-checkpointing", "--siglip", "--loss-dist-impl", "gather"]
    begun = begin(tmp_path / "one", *models["clip"], *flags)
    model, loss = begun.model, begun.loss.inner
    assert type(model) is open_clip.CustomTextCLIP
    assert any(isinstance(module, QuickGELU) for module in model.visual.modules())
    assert model.visual.patch_dropout.prob == 0.25
    assert model.context_length == 9
    assert model.visual.transformer.grad_checkpointing
    assert model.text.transformer.grad_checkpointing
    assert model.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert type(loss) is open_clip.loss.SigLipLoss
    assert loss.dist_impl == "gather"
    assert float(model.logit_bias) == -10
    assert float(model.logit_scale) == pytest.approx(math.log(10), abs=0.01)
    loss = begin(tmp_path / "two", *models["clip"], "--local-loss", "--gather-with-grad").loss.inner
    assert loss.local_loss
    assert loss.gather_with_grad
    model = begin(tmp_path / "three", *models["clip"], "--torchscript").model
    assert isinstance(model, torch.jit.ScriptModule)


def trained(model: torch.nn.Module, part: str) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and part in name}


def test_towers_are_locked_as_asked(models: dict[str, list[str]], tmp_path: Path) -> None:
    """Oracle: the groups of OpenCLIP's `lock`, the last of them the projection, which an ov2 model does not train."""
    image, text = ["--lock-image", "--lock-image-unlocked-groups", "2"], ["--lock-text", "--lock-text-unlocked-layers"]
    text += ["2", "--lock-text-freeze-layer-norm"]
    of_ov2 = trained(begin(tmp_path / "ov2", *models["ov2"], *image).model, "visual.")
    last = len(open_clip.create_model(TINY_MODEL, load_weights=False).visual.transformer.resblocks) - 1
    assert of_ov2
    assert {name.split(".")[3] for name in of_ov2} == {str(last)}
    both = begin(tmp_path / "both", *models["ov2"], *image, "--freeze", f"visual.transformer.resblocks.{last}.*").model
    assert not trained(both, "visual.")
    model = begin(tmp_path / "clip", *models["clip"], *image, *text).model
    assert {name.rsplit(".", 1)[0] if "resblocks" not in name else "block" + name.split(".")[3]
            for name in trained(model, "visual.")} == {"block2", "visual.ln_post", "visual"}  # fmt: skip
    theirs = trained(model, "") - trained(model, "visual.") - {"logit_scale"}
    assert {name.split(".")[2] for name in theirs if "resblocks" in name} == {"2"}
    assert {name for name in theirs if "resblocks" not in name} == {
        "ln_final.weight", "ln_final.bias", "text_projection"
    }  # fmt: skip
    frozen = begin(tmp_path / "resnet", *models["resnet"], "--lock-image", "--lock-image-freeze-bn-stats").model
    kinds = {type(module).__name__ for module in frozen.visual.modules()}
    assert "FrozenBatchNorm2d" in kinds
    assert "BatchNorm2d" not in kinds


def test_weights_come_from_a_file_and_a_cache(
    models: dict[str, list[str]], tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracles: the files. Nothing can be downloaded here, so what is found was found in the cache."""
    torch.manual_seed(5)
    model = open_clip.create_model(models["clip"][1], load_weights=False)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    loaded = begin(tmp_path / "file", *models["clip"], "--pretrained", str(tmp_path / "clip.pt")).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default"))
    tower = timm.create_model("test_vit")
    save_model(tower, cached(tmp_path / "default", "timm/test_vit.r160_in1k") / "model.safetensors")
    found = begin(tmp_path / "image", *models["timm"], "--pretrained-image").model.visual.trunk.state_dict()
    expected = {name: value for name, value in tower.state_dict().items() if not name.startswith("head.")}
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    folder = cached(tmp_path / "given", "somebody/words")
    for file in vocabulary.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    flags = ["--model", TINY_MODEL, "--tokenizer", "somebody/words"]
    begun = begin(tmp_path / "words", *flags, "--cache-dir", str(tmp_path / "given"))
    assert begun.model.text_config.vocab_size == len((vocabulary / "vocab.txt").read_text().splitlines())
    with pytest.raises(UserError, match="somebody/words"):
        begin(tmp_path / "none", *flags)


def cached(cache: Path, name: str) -> Path:
    """A folder of the hub's cache for files of the repository NAME."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_a_teacher_is_distilled_and_the_student_saved(models: dict[str, list[str]], tmp_path: Path) -> None:
    """Oracles: OpenCLIP's class of the loss; the teacher's file; a student without a teacher."""
    torch.manual_seed(6)
    teacher = open_clip.create_model(models["clip"][1], load_weights=False).state_dict()
    torch.save(teacher, tmp_path / "teacher.pt")
    asked = ["--distill-model", models["clip"][1], "--distill-pretrained", str(tmp_path / "teacher.pt")]
    begun, alone = (begin(tmp_path / str(len(more)), *models["clip"], *more) for more in (asked, []))
    assert type(begun.loss.inner) is open_clip.loss.DistillClipLoss
    assert all(torch.equal(value, teacher[name]) for name, value in begun.teacher.state_dict().items())
    assert begun.built.model is begun.model
    assert all(torch.equal(v, begun.model.state_dict()[name]) for name, v in alone.model.state_dict().items())


def parsed(models: dict[str, list[str]], model: str, *flags: str) -> RunPlan:
    common = ["--dataset-type", "synthetic", "--train-num-samples", "8"]
    return parse([*models[model], *common, *flags], world_size=1, gpu=False)


SLIPS: list[tuple[str, list[str], str]] = [
    ("clip", ["--lock-image-unlocked-groups", "1"], "without --lock-image: it has no effect"),
    ("resnet", ["--lock-image-freeze-bn-stats"], "without --lock-image: it has no effect"),
    ("clip", ["--lock-text-unlocked-layers", "1"], "without --lock-text: it has no effect"),
    ("clip", ["--lock-text-freeze-layer-norm"], "without --lock-text: it has no effect"),
    ("clip", ["--lock-text"], "add --lock-text-freeze-layer-norm"),
    ("clip", ["--distill-model", "ViT-B-32"], "without --distill-pretrained: it has no effect"),
    ("clip", ["--distill-pretrained", "laion2b"], "without --distill-model: it has no effect"),
    ("clip", ["--loss-dist-impl", "gather"], "without --siglip: it has no effect"),
    ("ov2", ["--lr-cooldown-power", "2"], "without --lr-scheduler const-cooldown: it has no effect"),
    ("ov2", ["--lr-scheduler", "const-cooldown"], "needs --epochs-cooldown"),
    ("ov2", ["--momentum", "0.9"], "without --opt timm/NAME: it has no effect"),
    ("clip", ["--lr", "1", "--opt", "timm/sgd", "--beta1", "0.9"], "--beta1 and --beta2, or neither"),
    ("clip", ["--coca-caption-loss-weight", "1"], "without a model with captions: it has no effect"),
    ("ov2", ["--coca-contrastive-loss-weight", "1"], "without CoCa or ov1-of-NAME: it has no effect"),
    ("clip", ["--pretrained-image"], "image towers of timm alone"),
    ("ov2", ["--logs", "None"], "--logs None: a run is resumed from its folder"),
]


def test_text_towers_of_transformers_may_keep_their_layer_norms_in_training(models: dict[str, list[str]]) -> None:
    """Oracle: OpenCLIP's HFTextEncoder.lock takes it; its own TextTransformer asserts that it is not asked."""
    args = parsed(models, "clip", "--lock-text", "--lock-text-freeze-layer-norm").stages[0].args
    args.lock_text_freeze_layer_norm = False
    with pytest.raises(UserError, match="add --lock-text-freeze-layer-norm"):
        check_stock(args)
    args.model = "roberta-ViT-B-32"
    check_stock(args)


DISTILL = ["--distill-pretrained", "x.pt", "--distill-model"]
SLIPS += [
    ("clip", [*DISTILL, "ViT-B-32", "--accum-freq", "2"], "does not accumulate gradients"),
    ("clip", [*DISTILL, "ViT-B-32", "--siglip"], "leave out --siglip"),
    ("clip", [*DISTILL, TINY_MODEL], "name a CLIP model"),
    ("clip", [*DISTILL, "local-dir:{folder}"], "it has no weights"),
    ("clip", [*DISTILL, "ViT-B-33"], "--distill-model ViT-B-33: no such model; did you mean ViT-B-32"),
]


@pytest.mark.parametrize(("model", "flags", "why"), SLIPS)
def test_what_would_have_no_effect_is_refused(
    models: dict[str, list[str]], model: str, flags: Sequence[str], why: str, tmp_path: Path
) -> None:
    config = {"model_cfg": open_clip.get_model_config("tiny_clip"), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        parsed(models, model, *(flag.replace("{folder}", str(tmp_path)) for flag in flags))
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flag_may_be_for_one_stage_alone(models: dict[str, list[str]]) -> None:
    stages = ["--stage", "24:samples=8,schedule=const", "--stage", "24:samples=8,schedule=const-cooldown"]
    common = ["--dataset-type", "synthetic", "--warmup", "0", "--epochs-cooldown", "1"]
    plan = parse([*models["ov2"], *common, *stages, "--batch-size", "8"], world_size=1, gpu=False)
    assert [stage.args.lr_scheduler for stage in plan.stages] == ["const", "const-cooldown"]
