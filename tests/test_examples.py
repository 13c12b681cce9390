"""The scripts in examples/, run as a user runs them, on small data. Oracle: what they print and leave behind."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from export_fixtures import make_language_model, make_run
from PIL import Image
from square_shards import COLORS

Capture = pytest.CaptureFixture[str]
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *argv])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_each_example_has_a_test_and_the_command_that_runs_it() -> None:
    for file in EXAMPLES.glob("*.py"):
        assert f"python examples/{file.name} " in file.read_text(encoding="utf-8")
        assert f'"{file.name}"' in Path(__file__).read_text(encoding="utf-8")


def test_train_on_my_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Every tenth picture is held out and captioned; the run is an ov2 run."""
    folder = tmp_path / "pictures" / "squares"
    folder.mkdir(parents=True)
    for number in range(30):
        name = list(COLORS)[number % 4]
        Image.new("RGB", (40, 32), COLORS[name]).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {name} square\n")
    Image.new("RGB", (40, 32)).save(folder / "no_caption.png")
    flags = ["--samples", "64", "--resolution", "32", "--batch-size", "8", "--workers", "0"]
    flags += ["--out", str(tmp_path / "o")]
    run(monkeypatch, "train_on_my_pictures.py", str(tmp_path / "pictures"), *flags)
    captioned = re.findall(r"^(\d\d)\.png: ", capsys.readouterr().out, re.MULTILINE)
    assert captioned == ["00", "10", "20"]
    assert len((tmp_path / "o" / "train.csv").read_text().splitlines()) == 1 + 27
    assert (tmp_path / "o" / "pictures" / "checkpoints" / "stage_1.pt").is_file()


def test_compare_with_clip(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A line for each model. The colors are so plain that both encoders beat guessing one of four (a property)."""
    flags = ["--train-data", f"{squares}/train/{{00000..00003}}.tar", "--val-data", f"{squares}/val/00000.tar"]
    flags += ["--label-key", "json:kind", "--resolution", "24", "--samples", "32", "--logs", str(tmp_path)]
    run(monkeypatch, "compare_with_clip.py", *flags)
    rows = re.findall(r"^(\S+) +([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["ov2-vit-nano-8", "clip-of-ov2-vit-nano-8"]
    assert all(float(row[2]) > 25 for row in rows)


def test_encoder_into_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A step along the gradient lowers the loss of the answer that it was taken for."""
    make_run(tmp_path / "run")
    make_language_model(tmp_path / "llm")
    Image.effect_noise((70, 60), 80).convert("RGB").save(tmp_path / "cat.png")
    words = [str(tmp_path / "cat.png"), "what is this ?", "a red square"]
    flags = ["--language-model", str(tmp_path / "llm"), "--out", str(tmp_path / "llava")]
    run(monkeypatch, "encoder_into_llava.py", str(tmp_path / "run"), *words, *flags)
    before, after = map(float, re.findall(r"(\d+\.\d+)", capsys.readouterr().out.splitlines()[-1]))
    assert after < before
