"""Curves of `ov2 plot --robustness`. Oracle: the numbers in the file, and matplotlib's own record of what was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.tracking.robustness import PANELS, read_evaluation

FOUND = {
    "caption-loss": {"caption_loss": 1.0},
    "keep-ratios": {"by_keep_ratio": {"0.25": {"caption_loss": 1.5}, "1": {"caption_loss": 1.2}}},
    "image-sizes": {"by_image_size": {"32": {"knn": {"top1": 0.25}}, "48": {"knn": {"top1": 0.5}}}},
}


def test_points_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(FOUND))
    found = read_evaluation(tmp_path)
    assert [panel.points(found) for panel in PANELS] == [
        [(0.25, 1.5), (1.0, 1.2)], [], [(32.0, 25.0), (48.0, 50.0)],
    ]  # fmt: skip


def test_a_panel_for_each_curve_there_is(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "eval.json").write_text(json.dumps(FOUND))
    (tmp_path / "two.json").write_text(json.dumps({"keep-ratios": FOUND["keep-ratios"]}))
    sizes = []
    for name in ("one", "two.json"):
        out = tmp_path / f"{name}.png"
        assert ov2(["plot", str(tmp_path / name), "--robustness", "--out", str(out)]) == 0
        sizes.append(Image.open(out).size[0])
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (json.dumps({"knn": {}}), [], "no curve; run `ov2 eval --tasks keep-ratios,image-sizes"),
        ("[]", [], "no result of `ov2 eval`"),
        (None, [], "no result of `ov2 eval`"),
        (json.dumps(FOUND), ["--metric", "lr"], "leave one of the two out"),
    ],
)
def test_slips(
    tmp_path: Path, content: str | None, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "e.json").write_text(content)
    argv = ["plot", str(tmp_path / "e.json"), "--robustness", "--out", str(tmp_path / "x.png"), *flags]
    assert ov2(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
