"""The Python API. Oracles: the commands, which take the same flags; a real run on synthetic data."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import open_clip_ov2 as ov2
from open_clip_ov2.cli import main
from open_clip_ov2.training import as_argv

NANO = {"model": "ov2-vit-nano-8", "stage": ["32:samples=8,global-batch=4", "64:samples=4,global-batch=4"]}


def test_a_mapping_is_a_command_line() -> None:
    """Oracle: the flags, written out."""
    assert as_argv({**NANO, "lr": 1e-3, "color_jitter": True, "wd": None, "aug_cfg": ["a=1", "b=2"]}) == [
        "--model", "ov2-vit-nano-8", "--stage", "32:samples=8,global-batch=4", "--stage", "64:samples=4,global-batch=4",
        "--lr", "0.001", "--color-jitter", "--aug-cfg", "a=1", "b=2",
    ]  # fmt: skip
    assert as_argv(("--lr", "1")) == ["--lr", "1"]


def test_a_plan_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ov2.plan(NANO, gpus=2, mfu=0.3)
    assert main(["plan", *as_argv(NANO), "--gpus", "2", "--mfu", "0.3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (plan.hours, plan.total_flops) == (printed["total"]["hours"], printed["total"]["flop"])


def test_train_returns_the_folder_of_the_run(tmp_path: Path) -> None:
    """Oracle: what is checked before, and a model that can be opened afterwards."""
    flags = {**NANO, "dataset_type": "synthetic", "logs": tmp_path, "workers": 0, "device": "cpu"}
    checked = ov2.check(flags, gpus=False)
    run = ov2.train(flags)
    assert run == checked.run_dir
    assert checked.total_samples == 12
    opened = ov2.open_model(run)
    assert sum(parameter.numel() for parameter in opened.model.parameters()) == checked.parameters
    assert opened.model.visual.image_size in (64, (64, 64))


def test_mistakes_are_user_errors() -> None:
    for call in (ov2.train, ov2.plan, ov2.check):
        with pytest.raises(ov2.UserError, match="--model is missing"):
            call({"train_data": "x.tar"})


def test_functions_keep_their_names_beside_the_packages() -> None:
    """`train` and `evaluate` are packages too: importing their modules must not take the functions' place."""
    before: dict[str, Any] = {name: getattr(ov2, name) for name in ov2.__all__}
    for module in pkgutil.walk_packages(ov2.__path__, "open_clip_ov2."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    assert {name: getattr(ov2, name) for name in ov2.__all__} == before
