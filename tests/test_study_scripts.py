"""What scripts/study.sh does around `ov2 compare`: mixed shards, the floor of gray pixels, the pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from written_sets import SCRIPTS, read


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def sample_sets(scripts: None) -> ModuleType:
    import sample_sets

    return sample_sets


def bars(sample_sets: ModuleType, path: Path, number: int, seed: int) -> Path:
    """Pictures of a bright bar somewhere, upright or lying, with noise; the last one has no label."""
    rng, samples = np.random.default_rng(seed), []
    for place in range(number):
        pixels, start = rng.integers(0, 60, (32, 32)), int(rng.integers(0, 24))
        pixels[start : start + 8] = 250
        label = ("lying", "upright")[place % 2]
        picture = Image.fromarray((pixels.T if place % 2 else pixels).astype(np.uint8)).convert("RGB")
        about = {"captions": [f"a bar, {label}"], "label": label if place < number - 1 else ""}
        samples.append(sample_sets.Sample(f"{place:04d}", sample_sets.jpeg(picture), about))
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_sets.write_shard(path, samples)
    return path


def test_gray_pixels_tell_bars_apart(sample_sets: ModuleType, tmp_path: Path) -> None:
    """Oracle: by hand. Lying and upright bars are told apart by pixels alone; a picture without a label is no test."""
    train, test = (bars(sample_sets, tmp_path / f"{seed}" / "00000.tar", 61, seed) for seed in (0, 1))
    out = tmp_path / "pixels.json"
    ran = subprocess.run(
        [sys.executable, SCRIPTS / "pixel_knn.py", train, test, out], capture_output=True, text=True, check=True
    )
    assert json.loads(out.read_text()) == {"knn": {"top1": 1.0, "top5": None, "n_test": 60}}
    assert ran.stdout == "16 x 16 gray pixels: top-1 100.0% of 60 pictures\n"


def test_mixed_shards_have_every_sample_once(sample_sets: ModuleType, tmp_path: Path) -> None:
    """Oracle: the samples that were put in. Equal keys of two tars stay apart; kinds are mixed."""
    import mix_shards

    tars = [bars(sample_sets, tmp_path / f"{seed}" / "00000.tar", 20, seed) for seed in (0, 1)]
    pattern = mix_shards.mix(tmp_path / "mixed", tars, shard=16, seed=0)
    assert pattern == f"{tmp_path}/mixed/{{00000..00001}}.tar"  # a third of eight is no more than half
    mixed = [one.jpeg for one in read(tmp_path / "mixed")]
    put_in = [one.jpeg for tar in tars for one in read(tar.parent)]
    assert len(mixed) == len(set(mixed)) == 32
    assert set(mixed) <= set(put_in)
    assert json.loads((tmp_path / "mixed" / "sizes.json").read_text()) == {"00000.tar": 16, "00001.tar": 16}
    assert 0 < sum(one in put_in[:20] for one in mixed[:16]) < 16


def test_pages_get_the_answers(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand. README has the first comparison's, docs/study.md all; what stands around them stays."""
    import study_pages

    (tmp_path / "docs").mkdir()
    page = f"before\n{study_pages.BEGIN}\nold\n{study_pages.END}\nafter\n"
    for name in ("README.md", "docs/study.md"):
        (tmp_path / name).write_text(page)
    (tmp_path / "answers.md").write_text("### One\n\n- Yes.\n\n### Two\n\n- No.\n")
    study_pages.main(tmp_path / "answers.md", tmp_path)
    readme, study = ((tmp_path / name).read_text().splitlines() for name in ("README.md", "docs/study.md"))
    assert [readme[0], *readme[-3:]] == ["before", "- Yes.", study_pages.END, "after"]
    assert study[-9:] == ["### One", "", "- Yes.", "", "### Two", "", "- No.", study_pages.END, "after"]
    assert "`bash scripts/study.sh`" in readme[2]
    monkeypatch.setenv("SCALE", "1.4")
    study_pages.main(tmp_path / "answers.md", tmp_path)
    assert "`SCALE=1.4 bash scripts/study.sh`" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="no <!-- answers -->"):
        study_pages.with_answers("nothing", "made", "text")
