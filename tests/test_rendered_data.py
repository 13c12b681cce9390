"""Rendered pictures: the same bytes for the same settings, disjoint splits, captions that survive."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageDraw
from written_sets import SCRIPTS, Stored, read

OPTIONS = ["--train", "240", "--short", "60", "--held-out", "20", "--size", "64"]

pytest.importorskip("wonderwords")
pytest.importorskip("font_roboto")


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "rendered_data.py"), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, made by one process."""
    out = tmp_path_factory.mktemp("demo") / "data"
    done = run(out, *OPTIONS, "--workers", "1")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def splits(made: Path) -> dict[str, list[Stored]]:
    return {split: read(made / split) for split in ("short", "train", "held-out")}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("rendered_data")


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
    with pytest.raises(SystemExit, match="not a finished set"):
        script.main([str(tmp_path)])


def test_missing_package_is_named(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "NEEDED", ("webdataset", "no_such_package"))
    with pytest.raises(SystemExit, match=r"missing no_such_package: pip install 'open_clip_ov2\[demo\]'$"):
        script.main([str(tmp_path / "data")])


def test_sizes_and_shards(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards hold SHARD samples, the last one the rest, and sizes.json says so."""
    monkeypatch.setattr(script, "SHARD", 4)
    about = {"kind": "words", "captions": ["the word a"]}
    samples = [script.Sample(f"{index:03d}", b"jpeg", about) for index in range(10)]
    assert len(script.write_shards(tmp_path / "set", 10, samples)) == 10
    sizes = json.loads((tmp_path / "set" / "sizes.json").read_text())
    assert sizes == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 2}
    assert [sample.text for sample in read(tmp_path / "set")] == ["the word a"] * 10


def test_kinds_and_guess(made: Path, script: ModuleType, splits: dict[str, list[Stored]]) -> None:
    kinds = {split: {sample.about["kind"] for sample in samples} for split, samples in splits.items()}
    assert kinds["train"] == set(script.MIX)
    assert kinds["held-out"] == set(script.HELD_OUT)
    guess = json.loads((made / "guess.json").read_text())
    assert set(guess) == kinds["held-out"]
    assert all(0 < chance < 0.05 for chance in guess.values())


def test_held_out_captions_are_not_trained(splits: dict[str, list[Stored]]) -> None:
    """Words in other renderings are the only captions that occur in both, but for numbers and chance strings."""
    trained = {sample.text for sample in splits["train"]} | {sample.text for sample in splits["short"]}
    for sample in splits["held-out"]:
        if sample.about["kind"] in ("shapes", "charts", "new words", "new fonts"):
            assert sample.text not in trained
    assert not {sample.jpeg for sample in splits["train"]} & {sample.jpeg for sample in splits["held-out"]}


def test_words_and_fonts_are_held_out(script: ModuleType) -> None:
    """A tenth of the words, and whole font families."""
    trained, new = set(script.vocabulary(False)), set(script.vocabulary(True))
    assert not trained & new
    assert 0.07 < len(new) / len(trained | new) < 0.13
    assert len(trained) > 5000
    text = script.rendered_text
    fonts = {Path(font).stem.split("-")[0] for font in text.font_files(text.TRAINED_FONTS)}
    assert fonts == {"DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "Roboto", "Lato", "Caladea"}
    assert not fonts & {Path(font).stem.split("-")[0] for font in text.font_files(text.HELD_OUT_FONTS)}


def test_short_text_is_short(splits: dict[str, list[Stored]]) -> None:
    for sample in splits["short"]:
        if sample.about["kind"] not in ("shapes", "charts"):
            assert all(len(word) <= 3 for word in sample.text.split()[2:]), sample.text


def test_captions_survive_the_tokenizer(made: Path, splits: dict[str, list[Stored]]) -> None:
    """Property: no unknown piece, and decoding gives the caption back."""
    from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer

    tokenizer = WordPieceTokenizer(made / "tokenizer")
    (unknown,) = tokenizer.encode("\N{SNOWMAN}")
    for caption in {sample.text for samples in splits.values() for sample in samples}:
        ids = tokenizer.encode(caption)
        assert unknown not in ids, caption
        assert tokenizer.decode(ids) == caption
        assert len(ids) <= 30, caption


@pytest.mark.parametrize("lines", [("i",), ("www",), ("wardrobe",), ("possession", "everything")])
def test_text_lies_within_the_picture(
    script: ModuleType, lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the ink of the same text on a larger picture. The rim takes a sliver at most; no type is tiny."""
    monkeypatch.setattr(Image.Image, "rotate", lambda image, *_: image)
    text = script.rendered_text
    for seed, file in enumerate(text.font_files({**text.TRAINED_FONTS, **text.HELD_OUT_FONTS})):
        font = text.fitting_font(lines, file, 96, random.Random(seed))
        whole = Image.new("L", (400, 400))
        for number, line in enumerate(lines):
            ImageDraw.Draw(whole).text((100, 100 + 100 * number), line, font=font, fill=255)
        mask = text.draw_lines(lines, file, 96, random.Random(seed))
        assert np.asarray(mask).sum() > 0.94 * np.asarray(whole, dtype=np.int64).sum(), file
        assert font.size >= 8


def test_pictures_open_and_captions_come_first(splits: dict[str, list[Stored]]) -> None:
    for samples in splits.values():
        for sample in samples:
            assert Image.open(io.BytesIO(sample.jpeg)).size == (64, 64)
            assert sample.about["captions"] == [sample.text]


def test_labels_say_what_captions_say(splits: dict[str, list[Stored]]) -> None:
    """Oracle: each label read off the caption by a rule of its own; none is new to a probe trained on the others."""

    def label(kind: str, caption: str) -> str:
        words = caption.split()
        if kind == "charts":
            bars = re.findall(r"(\w+) (\d)", caption)
            return f"chart, {next(name for name, value in bars if value == max(v for _, v in bars))} tallest"
        if kind != "shapes":
            return f"text in {words[2][0]}"
        if " at the " in caption:
            return " ".join(words[2:4])
        relation = re.search("left of|above", caption)
        return f"two, {relation[0]}" if relation else f"{words[0]} equal"

    for samples in splits.values():
        for sample in samples:
            assert sample.about["label"] == label(sample.about["kind"], sample.text), sample.text
