"""Icons from a made-up package in Iconify's format: splits that are disjoint, the same bytes each time, true labels."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from written_sets import SCRIPTS, Stored, read

pytest.importorskip("resvg_py")

THINGS = ["bell", "camera", "star", "lamp", "heart", "key", "sun", "moon", "cloud", "house", "tree", "fish"]
FAMILIES = 12
OPTIONS = ["--size", "16", "--held-out-families", "3", "--held-out", "20"]
LICENSE = {"title": "MIT", "spdx": "MIT", "url": "https://license"}


def family(number: int) -> dict[str, Any]:
    """Each thing twice, as a square of its own size and in outline; a red lamp; withdrawn, blank and logo icons."""
    icons: dict[str, Any] = {}
    for place, thing in enumerate(THINGS):
        side = 8 + place
        icons[thing] = {"body": f'<rect y="{number}" width="{side}" height="8" fill="currentColor"/>'}
        icons[f"{thing}-outline"] = {"body": f'<path d="M4 {number}h{side}v9z" stroke="currentColor" fill="none"/>'}
    icons["red-lamp-24-filled"] = {"body": '<circle cx="12" cy="12" r="8" fill="#f00"/>'}
    icons["gone"] = {"body": icons["bell"]["body"], "hidden": True}
    icons["blank"] = {"body": '<rect width="24" height="24" fill="#fff"/>'}
    icons["github"] = {"body": icons["bell"]["body"]}
    if number % 2:  # a copy of another hand's drawing
        icons["key"] = {"body": '<rect width="20" height="20" fill="currentColor"/>'}
    aliases = {"chime": {"parent": "bell"}, "flipped": {"parent": "key", "hFlip": True}}
    return {
        "prefix": f"family{number}", "icons": icons, "aliases": aliases, "width": 24, "height": 24,
        "categories": {"Night": ["moon", "star"]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("icons") / "package"
    (folder / "json").mkdir(parents=True)
    about: dict[str, Any] = {}
    for number in range(FAMILIES):
        prefix = f"family{number}"
        about[prefix] = {"name": prefix.title(), "author": {"name": f"Hand {number // 2}"}, "license": LICENSE}
        (folder / "json" / f"{prefix}.json").write_text(json.dumps(family(number)))
    about["family11"]["license"] = {"title": "GPL", "spdx": "GPL-3.0", "url": ""}
    about["family10"]["category"] = "Logos"
    (folder / "collections.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))  # for as long as processes of its own import it
    yield importlib.import_module("icons_data")
    sys.path.remove(str(SCRIPTS))


def run(package: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "icons_data.py"), str(out), "--package", str(package)]
    return subprocess.run([*command, *OPTIONS, *options], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def small(script: ModuleType) -> Iterator[None]:
    """What is meant for hundreds of families, for ten; and shards of 30 icons."""
    splits = importlib.import_module("icon_splits")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CLASSES": 6, "LARGEST_HAND": 0.5, "HELD_OUT_WORDS": 3, "COMMON": 1.0}.items():
            patch.setattr(splits, name, value)
        patch.setattr(script, "SHARD", 30)
        yield


@pytest.fixture(scope="module")
def made(package: Path, script: ModuleType, small: None) -> Path:
    out = package.parent / "made"
    script.main([str(out), "--package", str(package), *OPTIONS, "--workers", "2"])
    return out


@pytest.fixture(scope="module")
def sets(made: Path) -> dict[str, list[Stored]]:
    return {path.parent.name: read(path.parent) for path in made.glob("*/sizes.json")}


def test_interrupted_run_is_continued_to_the_same_bytes(
    package: Path, made: Path, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run that was not interrupted. What was drawn is not drawn again; no other settings are continued."""

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    arguments = [str(tmp_path / "set"), "--package", str(package), *OPTIONS, "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(script, "write_about", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments)
    unfinished = tmp_path / ".set-unfinished"
    assert not (tmp_path / "set").exists()
    sizes = json.loads((unfinished / "sizes.json").read_text())
    del sizes["unseen-names"]["00000.tar"]
    (unfinished / "sizes.json").write_text(json.dumps(sizes))
    (unfinished / "unseen-names" / "00000.tar").rename(unfinished / "unseen-names" / "00000.unfinished")
    before = (unfinished / "train" / "00000.tar").stat().st_mtime_ns
    script.main(arguments)
    assert (tmp_path / "set" / "train" / "00000.tar").stat().st_mtime_ns == before
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "set") for path in (tmp_path / "set").rglob("*") if path.is_file()
    )
    for name in files:
        assert (made / name).read_bytes() == (tmp_path / "set" / name).read_bytes(), name


def test_finished_set_is_reused_and_other_settings_are_refused(package: Path, made: Path) -> None:
    again = run(package, made)
    assert (again.returncode, again.stdout.count("\n"), "reused" in again.stdout) == (0, 1, True)
    other = run(package, made, "--seed", "1")
    assert other.returncode == 1
    assert "other settings: seed 0 (now 1)" in other.stderr
    wrong = run(package / "json", made.parent / "wrong")
    assert wrong.returncode == 1
    assert "so it is not the package" in wrong.stderr


def test_whole_hands_and_whole_words_are_held_out(
    made: Path, sets: dict[str, list[Stored]], script: ModuleType
) -> None:
    """Property: no family, hand, word or drawing of the sets to test on is trained."""
    families = {name: {sample.about["family"] for sample in samples} for name, samples in sets.items()}
    assert families["unseen-families"]
    assert not families["unseen-families"] & families["train"]
    assert families["probe-train"] <= families["train"]
    assert families["unseen-names"] <= families["train"]
    assert families["probe-test"] <= families["unseen-families"]

    def hands(name: str) -> set[int]:
        return {int(one.removeprefix("family")) // 2 for one in families[name]}

    assert not hands("unseen-families") & hands("train")
    assert {"family10", "family11"}.isdisjoint(set.union(*families.values()))  # logos, and a license
    words = {name: {word for one in samples for word in one.text.split()} for name, samples in sets.items()}
    every = {word for one in sets["train"] for text in one.about["captions"] for word in script.words_of(text)}
    new = words["unseen-names"] - every
    assert new
    assert all(new & set(one.text.split()) for one in sets["unseen-names"])
    assert not new & words["unseen-families"]
    jpegs = {one.jpeg for one in sets["train"]}
    for name in ("unseen-families", "unseen-names", "probe-test"):
        assert not jpegs & {one.jpeg for one in sets[name]}, name
        assert max(Counter((one.about["family"], one.text) for one in sets[name]).values()) == 1, name


def test_other_licenses_come_when_asked_for(package: Path, script: ModuleType) -> None:
    assert script.families(package, True).keys() - script.families(package, False).keys() == {"family11"}


def test_names_captions_and_labels(sets: dict[str, list[Stored]], made: Path) -> None:
    """Oracle: what the made-up families say. Style and size are no part of a name; a turned alias is left out."""
    captions = {(one.text, tuple(one.about["captions"])) for samples in sets.values() for one in samples}
    assert ("bell", ("bell", "chime")) in captions
    assert ("bell", ("bell", "bell outline")) in captions
    texts = {text for text, _ in captions}
    assert texts <= {*THINGS, "red lamp"}
    assert not {"gone", "github", "blank", "flipped"} & texts
    assert "star, night" in {more for _, all_of_them in captions for more in all_of_them}
    classes = json.loads((made / "classes.json").read_text())
    for samples in sets.values():
        assert all(one.about.get("label", "") == (one.text if one.text in classes else "") for one in samples)
    assert all("label" in one.about for name in ("probe-train", "probe-test") for one in sets[name])
    assert json.loads((made / "guess.json").read_text())["icon"] == 1 / len(
        {"blank", *(one.text for one in sets["train"])}
    )


def test_styles_of_a_family_are_taken_off(script: ModuleType) -> None:
    """A word such as "light" is one of style only where a good part of the family has it."""
    names = importlib.import_module("icon_names")
    many = [f"thing{number}-light" for number in range(10)] + ["traffic-light"]
    assert names.shown("traffic-light", names.styles_of(many)) == "traffic"
    assert names.shown("traffic-light", names.styles_of(["traffic-light", *map("thing-{}".format, range(90))])) == (
        "traffic light"
    )
    for raw, shown in {
        "battery-charging-24-filled": "battery charging", "outline-key": "key", "home-2": "home",
        "calendar2-range": "calendar range", "dice-two-tone": "dice", "24": "", "4k": "", "outline": "outline",
    }.items():  # fmt: skip
        assert names.shown(raw, names.styles_of([])) == shown, raw


def test_drawing(script: ModuleType) -> None:
    """Oracle: where black and white must lie. The box is fitted into the square, in its middle; color is kept."""
    icon = importlib.import_module("icon_names").Icon

    def drawn(box: tuple[float, ...], body: str) -> Any:
        picture = script.draw(icon("f", "i", "i", (), box, body), 8)
        return None if picture is None else np.asarray(picture)

    half = drawn((10, 20, 4, 8), '<rect x="10" y="20" width="4" height="4" fill="currentColor"/>')
    assert half.shape == (8, 8, 3)
    assert (half[:4, 2:6] == 0).all()
    assert (half[4:] == 255).all()
    assert (half[:, :2] == 255).all()
    assert drawn((0, 0, 1, 1), '<rect width="1" height="1" fill="#f00"/><path d="M0 0"/>') is None
    red = drawn((0, 0, 2, 1), '<rect width="1" height="1" fill="#f00"/>')
    assert (red[2:6, :4] == (255, 0, 0)).all()
    assert drawn((0, 0, 1, 1), "") is None
    assert drawn((0, 0, 1, 1), "<rect") is None


def test_evaluation_reads_it(made: Path) -> None:
    """Oracle: the sets' own counts. The names that the scripts write are those that `ov2 eval` takes."""
    import open_clip_ov2 as ov2

    found = ov2.evaluate(
        "pixels:16", tasks="knn", data=f"{made}/probe-test/00000.tar",
        train_data=f"{made}/probe-train/00000.tar", label_key="json:label",
    )["knn"]  # fmt: skip
    sizes = [
        json.loads((made / name / "sizes.json").read_text())["00000.tar"] for name in ("probe-train", "probe-test")
    ]
    assert [found["n_train"], found["n_test"]] == sizes
    assert found["top1"] > 0.5  # the drawings of a thing are nearly the same in all families


def test_picture_opens(sets: dict[str, list[Stored]]) -> None:
    assert all(Image.open(io.BytesIO(one.jpeg)).size == (16, 16) for one in sets["probe-test"])
