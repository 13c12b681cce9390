"""Sweep files. Oracles: itertools, argparse, OpenCLIP's parser for what is shipped."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from open_clip_ov2.argv import to_argv
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.report import Row, draw, table, write_report
from open_clip_ov2.launch.sweep import Sweep, expand, load_sweep

ROOT = Path(__file__).parents[2]
values = st.lists(st.integers(0, 99) | st.floats(0.125, 8), min_size=1, max_size=3, unique_by=str)


@given(st.dictionaries(st.sampled_from(["lr", "wd", "keep-ratio", "seed"]), values, min_size=1))
def test_a_grid_is_every_combination_once(grid: dict[str, list[float]]) -> None:
    """Oracle: itertools.product."""
    runs = expand(Sweep("s", {"epochs": 1}, grid, (), ()))
    assert [tuple(run.varied.values()) for run in runs] == list(itertools.product(*grid.values()))
    assert len({run.name for run in runs}) == len(runs)
    assert all((run.base, run.own) == ({"epochs": 1}, run.varied) for run in runs)


@given(st.integers(), st.booleans(), st.lists(st.integers(0), min_size=1))
def test_words_are_what_a_parser_reads_back(number: int, switch: bool, several: list[int]) -> None:
    """Oracle: argparse."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int)
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--several", type=int, nargs="+")
    flags = {"number": number, "switch": switch, "several": several}
    assert vars(parser.parse_args(to_argv({**flags, "number": 1}))) | {"number": number} == flags


FILE = """\
[base]
epochs = 3
[grid]
model = ["ov2-vit-s-16", "local-dir:/models/tiny"]
keep_ratio = [0.25, 0.5]
[[set]]
when = { model = "local-dir:/models/tiny", keep-ratio = 0.5 }
lr = 1e-3
[[run]]
model = "ViT-B-16"
grad-checkpointing = true
"""


def test_grid_list_and_set(tmp_path: Path) -> None:
    """Oracle: written out."""
    file = tmp_path / "mine.toml"
    file.write_text(FILE)
    sweep = load_sweep(file)
    assert sweep.name == "mine"
    assert [(run.name, " ".join(to_argv({**run.base, **run.own}))) for run in expand(sweep)] == [
        ("ov2-vit-s-16_keep-ratio-0.25", "--epochs 3 --model ov2-vit-s-16 --keep-ratio 0.25"),
        ("ov2-vit-s-16_keep-ratio-0.5", "--epochs 3 --model ov2-vit-s-16 --keep-ratio 0.5"),
        ("tiny_keep-ratio-0.25", "--epochs 3 --model local-dir:/models/tiny --keep-ratio 0.25"),
        ("tiny_keep-ratio-0.5", "--epochs 3 --model local-dir:/models/tiny --keep-ratio 0.5 --lr 0.001"),
        ("ViT-B-16_grad-checkpointing-True", "--epochs 3 --model ViT-B-16 --grad-checkpointing"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "nothing to run"),
        ("[grid]\nlr = 1", "expected a list of values"),
        ("[grid]\nlr = []", "expected a list of values"),
        ("[grids]\nlr = [1]", "unknown key 'grids'"),
        ("[base]\nname = 'x'\n[grid]\nlr = [1]", "name: the sweep sets it"),
        ("name = '../x'\n[grid]\nlr = [1]", "expected letters, digits"),
        ("[run]\nlr = 1", "run: .* expected a list"),
        ("[[set]]\nlr = 1\n[grid]\nwd = [1]", "when"),
        ("[[set]]\nwhen = {wd = 2}\nlr = 1\n[grid]\nwd = [1]", "no run has wd = 2"),
        ("[grid]\nlr = [1, 1]", "two runs of the sweep are both lr-1"),
        ("[grid", "not TOML"),
    ],
)
def test_slips(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        expand(load_sweep(tmp_path / "s.toml"))
    assert "\n" not in str(error.value)


def test_the_shipped_sweep_is_accepted(squares: Path) -> None:
    """Oracle: the parsers of OpenCLIP and of `ov2 train`."""
    from open_clip_ov2.openclip.command.parse import parse

    runs = expand(load_sweep(ROOT / "configs" / "sweeps" / "keep_ratio.toml"))
    assert len(runs) == 12
    data = ["--train-data", f"{squares}/train/00000.tar", "--train-num-samples", "10000000"]
    plans = [parse([*to_argv(run.base), *to_argv(run.own), *data], 8, True) for run in runs]
    assert {plan.stages[0].args.batch_size for plan in plans} == {512}
    assert {plan.stages[0].options.keep_ratio.low for plan in plans if plan.stages[0].options.keep_ratio} == {
        0.2, 0.35, 0.5, 0.75, 1.0,
    }  # fmt: skip


def test_report_of_rows(tmp_path: Path) -> None:
    """Oracle: written out; the PNG is opened by a second library."""

    def made(name: str, varied: dict[str, object], last: float | None, state: str, reason: str) -> Row:
        return Row(name, varied, {"state": state, "loss": last, "reason": reason})

    rows = [
        made(f"{model}-{keep}", {"model": model, "keep-ratio": keep}, 2.0 + keep, "finished", "")
        for model in ("a", "b")
        for keep in (0.25, 0.5)
    ]
    rows.append(made("c", {"model": "c"}, None, "failed", "NaN | at once"))
    header, *lines = table(rows)
    assert ",".join(header) == "run,model,keep-ratio,state,loss,reason"
    assert lines[0] == ["a-0.25", "a", "0.25", "finished", "2.25", ""]
    assert lines[-1] == ["c", "c", "", "failed", "", "NaN | at once"]
    files = write_report(rows, "loss", tmp_path)
    assert [file.name for file in files] == ["report.csv", "report.md", "report.png"]
    assert "NaN \\| at once |" in files[1].read_text()
    assert len(files[0].read_text().splitlines()) == 6
    assert Image.open(files[2]).format == "PNG"


def row(name: str, last: float | None, **varied: object) -> Row:
    return Row(name, varied, {"loss": last, "caption_loss": last})


def test_plot_of_rows() -> None:
    """Oracle: the rows; matplotlib's own record of what was drawn."""
    axes = Figure().subplots()
    swept = [row(f"{lr}-{model}", 2 * lr, lr=lr, model=model) for model in ("a", "b") for lr in (0.5, 0.25)]
    draw(axes, [*swept, row("c", 3.0, model="c"), row("failed", None, lr=1.0, model="a")], "caption_loss")
    lines = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    points = [[0.25, 0.5], [0.5, 1.0]]
    assert lines == {"model c": [[0, 3], [1, 3]], "model a": points, "model b": points}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("lr", "caption loss")


def test_plot_of_rows_without_a_swept_number() -> None:
    """Oracle: the rows; matplotlib's own record of what was drawn."""
    axes = Figure().subplots()
    draw(axes, [row("one", 2.0, model="a", lr=1.0), row("two", 4.0, model="b", lr=1.0)], "loss")
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [2.0, 4.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


def test_a_range_among_swept_numbers_is_a_line() -> None:
    """Oracle: the rows."""
    axes = Figure().subplots()
    rows = [row(str(ratio), value, **{"keep-ratio": ratio}) for ratio, value in ((0.25, 3.0), (0.5, 2.0))]
    draw(axes, [*rows, row("range", 2.5, **{"keep-ratio": "0.25:1.0"})], "caption_loss")
    lines = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert lines == {"keep-ratio 0.25:1.0": [[0, 2.5], [1, 2.5]], "caption_loss": [[0.25, 3.0], [0.5, 2.0]]}
