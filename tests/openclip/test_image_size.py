"""Image sizes that patches do not fill are refused wherever a size is given. Oracle: division by the patch size."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_clip_ov2 import UserError, open_model
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.openclip.models.factory import check_image_size

TRAIN = ["train", "--dataset-type", "synthetic", "--train-num-samples", "8"]


@given(st.integers(1, 600), st.sampled_from([8, 14, 16, 32]))
def test_the_nearest_sizes_are_named(size: int, patch: int) -> None:
    if size % patch == 0:
        check_image_size(size, patch)
        return
    with pytest.raises(ValueError, match="nearest") as error:
        check_image_size((patch, size), patch)
    named = [int(word) for word in str(error.value).rsplit("nearest are", 1)[1].split(" and ")]
    assert named == [side for side in (size // patch * patch, size // patch * patch + patch) if side]


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "ov2-vit-nano-8", "--force-image-size", "36"],
        ["--model", "ov2-vit-nano-8", "--force-image-size", "32", "36"],
        ["--model", "clip-of-ov2-vit-nano-8", "--force-image-size", "36"],
        ["--model", "ov2-vit-nano-8", "--stage", "32:samples=8", "--stage", "36:samples=8"],
    ],
)
def test_training_refuses_before_it_starts(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [word for word in TRAIN if "--stage" not in flags or word not in ("--train-num-samples", "8")]
    assert ov2([*base, *flags, "--logs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "image size 36 is not a multiple of the patch size 8" in error
    assert "32 and 40" in error
    assert ("stage 2" in error) == ("--stage" in flags)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_refused_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "ov2-vit-l-14"\n[[stage]]\nresolution = 90\nsamples = 8\nglobal-batch = 4\n')
    for command in (["train", "--dataset-type", "synthetic", "--recipe", str(recipe)], ["plan", str(recipe)]):
        assert ov2(command) == 2
        assert "84 and 98" in capsys.readouterr().err


def test_python_refuses_too_but_for_a_models_own_size() -> None:
    with pytest.raises(ValueError, match="32 and 40"):
        open_clip.create_model("ov2-vit-nano-8", force_image_size=36)
    with pytest.raises(UserError, match="224 and 256"):
        open_model("ViT-B-32:openai", image_size=250)
