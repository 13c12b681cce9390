"""Figures of `ov2 plot`. Oracle: the numbers in the files, and matplotlib's own record of what was drawn (artists)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking import figures
from open_clip_ov2.tracking.figures import (
    COLORS,
    PANELS,
    draw_curves,
    draw_robustness,
    figure,
    plot_curves,
    read_evaluation,
    read_results,
    smoothed,
)

RESULT = {
    "caption-loss": {"caption_loss": 1.0},
    "keep-ratios": {"by_keep_ratio": {"0.25": {"caption_loss": 1.5}, "1": {"caption_loss": 1.2}}},
    "image-sizes": {"by_image_size": {"32": {"knn": {"top1": 0.25}}, "48": {"knn": {"top1": 0.5}}}},
}
RUN = [
    {"kind": "train", "stage": 1, "samples_seen": 8, "caption_loss": 4.0, "lr": 0.1},
    {"kind": "train", "stage": 1, "samples_seen": 16, "caption_loss": 2.0, "lr": 0.2},
    {"kind": "val", "stage": 1, "samples_seen": 16, "caption_loss": 3.0},
    {"kind": "train", "stage": 2, "samples_seen": 24, "caption_loss": 1.0, "lr": None},
    {"kind": "val", "stage": 2, "samples_seen": 24, "caption_loss": 2.5},
]


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of each labeled line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for line in axes.lines:
        label = str(line.get_label())
        if not label.startswith("_"):
            lines[label] = [(float(x), float(y)) for x, y in line.get_xydata()]  # type: ignore[union-attr]
    return lines


def write_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_curves_are_the_records() -> None:
    axes = Figure().subplots()
    draw_curves(axes, {"a": RUN, "b": RUN[2:3]}, "caption_loss")
    lines = drawn(axes)
    assert list(lines) == ["a, training (smoothed)", "a, validation", "b, validation"]
    assert lines["a, validation"] == [(16, 3.0), (24, 2.5)]
    assert lines["b, validation"] == [(16, 3.0)]
    assert [x for x, _ in lines["a, training (smoothed)"]] == [8, 16, 24]
    stages = [line.get_xdata() for line in axes.lines if str(line.get_label()).startswith("_")]
    assert stages == [[24, 24]]
    low, high = axes.get_xlim()
    assert low <= 8
    assert high >= 24
    assert axes.get_xlabel() == "samples seen"
    assert axes.get_ylabel() == "caption loss (nats per token)"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(lines)


def test_smoothing_follows_a_falling_loss_and_drops_outliers() -> None:
    """Oracle: a curve that falls stays as it is, from its first value on; medians, written out."""
    falling = [10.8, 4.0, 1.5, 1.4, 1.3, 1.3, 1.2, 1.2, 1.2, 1.1, 1.0, 1.0, 0.9, 0.9]
    assert smoothed(falling) == falling
    assert smoothed([1.0, 2.0, 9.0, 3.0, 1.0]) == [1.0, 2.0, 2.0, 3.0, 1.0]
    assert smoothed([]) == []


def test_records_without_the_metric_are_left_out() -> None:
    axes = Figure().subplots()
    draw_curves(axes, {"a": RUN}, "lr")
    assert [x for x, _ in drawn(axes)["a, training (smoothed)"]] == [8, 16]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RUN)
    with open(run / "results.jsonl", "a") as file:
        file.write('{"kind": "tra')
    assert read_results(run) == RUN


def test_a_file_without_a_record_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    with pytest.raises(UserError, match=r"results.jsonl: no record in it"):
        read_results(run)


def test_a_metric_by_its_former_name(tmp_path: Path) -> None:
    """Files of an earlier version call MFU `utilisation`. Oracle: the record, written out."""
    run = write_run(tmp_path / "run", [{**RUN[0], "utilisation": 0.25}])
    assert read_results(run) == [{**RUN[0], "mfu": 0.25}]
    plot_curves([run], tmp_path / "x.png", "utilisation")


def test_figure_saves_whole_pages_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    """Oracle: PIL reads the size that was asked for; matplotlib's own parameters are as before; SVG by the suffix."""
    before = dict(matplotlib.rcParams)
    with figure(tmp_path / "x.png", columns=2, size=(6, 2), style={"lines.linewidth": 7}) as panels:
        (line,) = panels[0].plot([1, 2], [3, 4])
        assert line.get_linewidth() == 7
        assert to_hex(line.get_color()) == COLORS[0]  # type: ignore[arg-type]
    assert len(panels) == 2
    assert Image.open(tmp_path / "x.png").size == (6 * 150, 2 * 150)
    assert dict(matplotlib.rcParams) == before
    with figure(tmp_path / "x.svg") as (axes,):
        axes.plot([1, 2], [3, 4])
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_points_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(RESULT))
    found = read_evaluation(tmp_path)
    assert [panel.points(found) for panel in PANELS] == [
        [(0.25, 1.5), (1.0, 1.2)], [], [(32.0, 25.0), (48.0, 50.0)],
    ]  # fmt: skip


def test_a_panel_for_each_curve_there_is() -> None:
    panels = [panel for panel in PANELS if panel.points(RESULT)]
    axes = list(Figure().subplots(1, len(panels)))
    draw_robustness(axes, panels, {"one": RESULT, "two": {"keep-ratios": RESULT["keep-ratios"]}})
    assert [drawn(one) for one in axes] == [
        {"one": [(0.25, 1.5), (1.0, 1.2)], "two": [(0.25, 1.5), (1.0, 1.2)]},
        {"one": [(32, 25), (48, 50)]},
    ]
    assert [one.get_xlabel() for one in axes] == ["keep ratio", "resolution (px)"]
    assert [one.get_ylabel() for one in axes] == ["caption loss (nats per token)", "k-NN top-1 (%)"]


def test_the_command_writes_an_image(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RUN)
    (run / "eval.json").write_text(json.dumps(RESULT))
    for flags in ([], ["--metric", "lr"], ["--robustness"]):
        out = tmp_path / "out.png"
        assert ov2(["plot", str(run), "--out", str(out), *flags]) == 0
        assert Image.open(out).format == "PNG"
        out.unlink()


def test_a_metric_that_no_run_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", RUN)
    assert ov2(["plot", str(run), "--out", str(tmp_path / "x.png"), "--metric", "top1"]) == 2
    assert "--metric top1: no run has it" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    plot_curves([run], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (json.dumps({"knn": {}}), [], "no curve to draw; first run `ov2 eval --tasks keep-ratios,image-sizes"),
        ("[]", [], "a result of `ov2 eval`"),
        (None, [], "e.json: cannot be read"),
        (json.dumps(RESULT), ["--metric", "lr"], "leave one of the two out"),
    ],
)
def test_user_errors(
    tmp_path: Path, content: str | None, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "e.json").write_text(content)
    argv = ["plot", str(tmp_path / "e.json"), "--robustness", "--out", str(tmp_path / "x.png"), *flags]
    assert ov2(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_equal_names_are_told_apart_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the legend; before, the last of them was drawn alone."""
    legends: list[list[str]] = []

    def kept(axes: Any, *rest: Any) -> None:
        names = rest[-1] if isinstance(rest[-1], dict) else rest[0]
        legends.append(list(names))

    monkeypatch.setattr(figures, "draw_curves", kept)
    monkeypatch.setattr(figures, "draw_robustness", kept)
    runs = []
    for logs in ("a", "b"):
        (tmp_path / logs).mkdir()
        runs.append(write_run(tmp_path / logs / "run", RUN))
        (runs[-1] / "eval.json").write_text(json.dumps(RESULT))
    other = write_run(tmp_path / "other", RUN)
    figures.plot_curves([*runs, other], tmp_path / "out.png")
    figures.plot_robustness([run / "eval.json" for run in runs], tmp_path / "out.png")
    assert legends == [[*map(str, runs), "other"], [str(run / "eval.json") for run in runs]]
