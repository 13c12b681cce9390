"""What of two words for one flag counts. Oracle: the flags, written out."""

from __future__ import annotations

import argparse
from pathlib import Path

from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.command.stage_flags import one_aug_cfg
from open_clip_ov2.openclip.run.loaders import caption_keys

DATA = ["--model", "ov2-vit-nano-8", "--train-data", "x.tar"]


def test_augmentations_come_together() -> None:
    words = ["--aug-cfg", "scale=(0.5,1)", "use_timm=True", "--lr", "1", "--aug-cfg=scale=(0.4,1)", "--wd", "-1"]
    assert one_aug_cfg(words) == ["--lr", "1", "--wd", "-1", "--aug-cfg", "scale=(0.4,1)", "use_timm=True"]
    assert one_aug_cfg(["--lr", "1"]) == ["--lr", "1"]


def test_a_stages_crop_scale_and_aug_cfg_both_count() -> None:
    plan = parse([*DATA, "--aug-cfg", "use_timm=True", "--stage", "24:samples=8,crop-scale=0.5:1"], 1, False)
    assert plan.stages[0].args.aug_cfg == {"use_timm": True, "scale": (0.5, 1.0)}


def test_a_csv_column_may_have_any_name(tmp_path: Path) -> None:
    for name in ("alt:text", "a,b", "caption=1"):
        plan = parse([*DATA[:3], "x.csv", "--csv-caption-key", name], 1, False)
        assert isinstance(plan.stages[0].args, argparse.Namespace)
        (key,) = caption_keys(plan.stages[0].args, plan.stages[0].options, train=True)
        assert (key.entry, key.path) == (name, ())
