"""Figures, table and page of a comparison made up here. Oracles are named at each test."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_up import variant_result
from matplotlib.figure import Figure

from open_clip_ov2.compare import page, plots, results
from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.results import (
    Found,
    Summary,
    as_json,
    check_metrics,
    flatten,
    learning_curves,
    mean_curve,
    read_evaluations,
    summary,
)
from open_clip_ov2.compare.verdict import verdict
from open_clip_ov2.errors import UserError

VOID = {"meta", "path", "use", "rect", "br", "link", "img"}


def test_summary() -> None:
    """Oracle: numpy."""
    values = np.random.default_rng(0).normal(size=7).tolist()
    found_summary = summary(values)
    assert found_summary is not None
    assert found_summary.sd == pytest.approx(np.std(values, ddof=1))
    assert found_summary.mean == pytest.approx(np.mean(values))
    assert summary([1.0]) == Summary(1.0, None)
    assert summary([]) is None


def test_flatten() -> None:
    """Oracle: by hand."""
    tree = {"a": {"b c": 1, "d": [2.5, {"e": 3}]}, "text": "x", "yes": True, "none": None}
    assert flatten(tree) == {"a.b c": 1.0, "a.d.0": 2.5, "a.d.1.e": 3.0}


def test_curves() -> None:
    """Oracle: by hand. Validations alone; over seeds only where all have a value."""
    records = [
        {"kind": "train", "samples_seen": 10, "x": 9.0}, {"kind": "val", "samples_seen": 10, "x": 1.0},
        {"kind": "val", "samples_seen": 20, "x": None}, {"kind": "val", "samples_seen": 30, "x": 2.0},
    ]  # fmt: skip
    (curve,) = learning_curves([Metric("y"), Metric("x.y", learning="x")], [records])["x.y"]
    assert curve == ((10.0, 1.0), (30.0, 2.0))
    (point,) = mean_curve([curve, ((30.0, 4.0),)])
    assert (point[0], point[1].mean) == (30.0, 3.0)


def test_a_metric_that_nobody_has(found: Found) -> None:
    check_metrics(found.comparison, set(), found.variants)
    with pytest.raises(UserError, match=r"metric probe.top1: no evaluation has it \(known: probe.acc\)"):
        check_metrics(found.comparison, {"probe.acc"}, [variant_result("ov2", (1.0,), values={"caption_loss": (1.0,)})])


def test_table(found: Found) -> None:
    """Oracle: by hand."""
    assert page.markdown(found).splitlines() == [
        "|  | images/s | × ov2 | step memory, MiB | largest batch | samples | training, s | caption loss, nats ↓ "
        "| probe <top-1>, % ↑ |",
        "| " + " | ".join(["---"] * 9) + " |",
        "| ov2 | 200 (180–220) | 1.00 (0.90–1.10) | 100 | 512 | 4 K | 20 | 2.10 ± 0.14 | **55.0 ± 7.1** |",
        "| CLIP | 150 | 0.75 | – | – | 4 K | 27 | – | 40.0 ± 0.0 |",
        "| stock | 20 | 0.10 | – | – | – | – | – | – |",
    ]


def test_csv_has_every_number(found: Found) -> None:
    """Oracle: csv's own reader, and the figures put in."""
    rows = list(csv.DictReader(io.StringIO(results.as_csv([found]))))
    (probe,) = (row for row in rows if row["arm"] == "ov2" and row["quantity"] == "probe.top1")
    assert [float(value) for value in probe["values"].split()] == [50, 60]
    assert float(probe["mean"]) == 55
    assert not [row for row in rows if row["arm"] == "CLIP" and row["quantity"] == "caption_loss"]
    assert json.loads(json.dumps(as_json([found])))[0]["arms"][0]["rates"] == [200.0, 220.0, 180.0]


class Reader(HTMLParser):
    """Tags balance; ids and what points to them are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "xlink:href", "src") and value:
                self.addresses.append(value)
            self.targets += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_page_stands_alone(found: Found) -> None:
    """Oracle: Python's HTML parser. Every tag closes, ids are unique, nothing is fetched, every plot is there."""
    drawn = plots.plots(found)
    assert [plot.name for plot in drawn] == [
        "small-speed", "small-caption-loss-over-samples", "small-caption-loss-over-seconds", "small-finals",
        "small-over-keep-ratio",
    ]  # fmt: skip
    text = page.page("All <of> it", [found], "ov2 compare small.toml & more")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert {plot.name for plot in drawn} <= set(reader.ids)
    assert set(reader.targets) <= set(reader.ids)
    assert all(address[1:] in reader.ids for address in reader.addresses if address.startswith("#"))
    assert [address for address in reader.addresses if not address.startswith("#")] == []
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places
    assert text.count("<svg") == len(drawn)
    assert "<script" not in text
    assert "All &lt;of&gt; it" in text
    assert "probe &lt;top-1&gt;" in text


def test_plots_take_the_pages_color_and_repeat(found: Found) -> None:
    """The same figures give the same bytes, so that a page in a repository changes where figures do."""
    one, other = plots.plots(found), plots.plots(found)
    assert one == other
    for plot in one:
        assert "currentColor" in plot.svg
        assert plots.INK not in plot.svg


def test_bold_is_what_every_seed_says(found: Found) -> None:
    """Oracle: by hand. Of equal means there is no best one, nor where one seed says otherwise, nor of no numbers."""

    def best(*values: tuple[float, ...]) -> dict[str, str]:
        arms = [variant_result(name, (1.0,), values={"probe.top1": v}) for name, v in zip("ab", values, strict=True)]
        return results.best(Found(found.comparison, tuple(arms), "a machine"))

    assert best((0.5, 0.6), (0.4, 0.5)) == {"probe.top1": "a"}
    assert best((0.0, 0.0), (0.0, 0.0)) == {}
    assert best((0.9, 0.4), (0.5, 0.5)) == {}
    assert best((float("nan"), 0.9), (0.5, 0.5)) == {}


def test_what_is_not_alike_is_said(found: Found) -> None:
    """Oracle: by hand."""
    one, *others = found.variants
    changed = Found(found.comparison, (replace(one, unlike=("lr 0.1 (0.2)", "eps 1 (2)")), *others), "a machine")
    flags, unlike, memory = page.notes(changed)
    assert flags == "Flags of all variants: --lr 0.1."
    assert unlike == "ov2 has, and ov2 in brackets: lr 0.1 (0.2); eps 1 (2)."
    assert "captions of 12 to 128 tokens, 64 on average" in memory


def test_two_evaluations_of_one_task_want_a_name(tmp_path: Path) -> None:
    """Oracle: by hand."""
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for value, file in enumerate(files):
        file.write_text(json.dumps({"checkpoint": "x", "knn": {"top1": value}}))
    with pytest.raises(UserError, match=r"two .* give knn.top1: give one of them a name"):
        read_evaluations(dict.fromkeys(files, ""))
    assert read_evaluations(dict(zip(files, ("", "half"), strict=True))) == {"knn.top1": 0.0, "half.knn.top1": 1.0}


# --- the verdict ---------------------------------------------------------------------------------------


def sentence_of(found: Found, *losses: tuple[float, ...], probes: tuple[tuple[float, ...], ...] = ()) -> str:
    """The verdict on variants a, b, ... with these caption losses (lower is better) and probes (higher is better)."""
    variants = []
    for index, name in enumerate("abc"[: max(len(losses), len(probes))]):
        values = {"caption_loss": losses[index]} if index < len(losses) else {}
        values |= {"probe.top1": probes[index]} if index < len(probes) else {}
        variants.append(variant_result(name, (1.0,), values=values))
    return verdict(Found(found.comparison, tuple(variants), "a machine"))


def test_a_clear_winner_where_lower_is_better(found: Found) -> None:
    """Oracle: by hand. Means 1.1 and 2.2; the worst seed of b, 1.2, is better than the best of a, 2.0."""
    assert sentence_of(found, (2.0, 2.4), (1.0, 1.2)) == (
        "b is better than a on caption loss: 1.10 against 2.20 nats after 4,000 samples each (50.0% lower), which is "
        "beyond the spread of 2 seeds."
    )


def test_a_clear_winner_where_higher_is_better(found: Found) -> None:
    """Oracle: by hand. Percentages differ in points; the best two of three variants are named."""
    assert sentence_of(found, probes=((0.5, 0.6), (0.1, 0.2), (0.7, 0.9))) == (
        "c is better than a on probe <top-1>: 80.0 against 55.0% after 4,000 samples each (25.0 points higher), which "
        "is beyond the spread of 2 seeds."
    )


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (((2.0, 2.4), (2.1, 2.2)), "the difference is within the spread of 2 seeds"),
        (((2.0,), (1.0,)), "one seed does not show how much seeds differ"),
        (((2.0, 2.0), (2.0, 2.0)), "they are equal"),
    ],
)
def test_cannot_tell(found: Found, losses: tuple[tuple[float, ...], ...], reason: str) -> None:
    """Oracle: by hand."""
    sentence = sentence_of(found, *losses)
    assert sentence.startswith("Cannot tell whether ")
    assert " on caption loss: " in sentence
    assert sentence.endswith(f", but {reason}.")


def test_nothing_to_compare(found: Found) -> None:
    """Oracle: by hand. One variant has the metric; a diverged one counts as none."""
    nothing = "Cannot tell which variant is better: no metric has values of two trained variants."
    assert sentence_of(found, (2.0, 2.4)) == sentence_of(found, (2.0, 2.4), (float("nan"), 1.0)) == nothing


def test_the_other_metrics_follow(found: Found) -> None:
    """Oracle: by hand. a wins the loss; probes: b wins, and then nobody."""
    losses = ((1.0, 1.1), (2.0, 2.1))
    assert sentence_of(found, *losses, probes=((0.1, 0.2), (0.3, 0.4))).endswith(
        " Best on other metrics, beyond the spread of seeds: b on probe <top-1>."
    )
    assert sentence_of(found, *losses, probes=((0.1, 0.4), (0.3, 0.4))).endswith(
        " Cannot tell which is best on probe <top-1>."
    )


def test_page_and_markdown_begin_with_the_verdict(found: Found) -> None:
    """Oracle: the sentence itself is the first paragraph; of several comparisons each has one, with its title."""
    sentence = verdict(found)
    text = page.page("All", [found], "ov2 compare")
    first = re.search(r"<p[^>]*>(.*?)</p>", text, flags=re.DOTALL)
    assert first is not None
    assert html.unescape(first.group(1)) == sentence
    assert page.results_md("All", [found], "ov2 compare").splitlines()[2] == sentence
    other = Found(replace(found.comparison, name="other", title="Other"), found.variants, "a machine")
    both = page.page("All", [found, other], "ov2 compare")
    assert both.count('class="verdict"') == 2
    assert f"**Other**: {sentence}" in page.results_md("All", [found, other], "ov2 compare")


# --- what plots draw -----------------------------------------------------------------------------------


def test_a_learning_curve_is_the_mean_with_its_band(found: Found) -> None:
    """Oracle: matplotlib's artists, and means and deviations by hand. CLIP has no caption loss, so no line."""
    metric = found.comparison.metrics[0]
    for over, x in (("samples", [2000, 4000]), ("seconds", [10, 20])):  # 200 images/s
        axes = Figure().subplots()
        plots.learning(axes, found, metric, over)
        (line,) = axes.lines
        assert line.get_label() == "ov2"
        np.testing.assert_allclose(line.get_xydata(), np.column_stack([x, [3.2, 2.1]]))
        band = axes.collections[0].get_paths()[0].vertices
        assert band[:, 1].min() == pytest.approx(2.1 - np.std([2.0, 2.2], ddof=1))
        assert band[:, 1].max() == pytest.approx(3.2 + np.std([3.0, 3.4], ddof=1))
        assert axes.get_ylabel() == "caption loss (nats)"


def test_bars_of_speed(found: Found) -> None:
    """Oracle: matplotlib's artists. The median's bar, the range's line, the first variant on top."""
    axes = Figure().subplots()
    plots.speeds(axes, found)
    assert [bar.get_width() for bar in axes.patches] == [20, 150, 200]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stock", "CLIP", "ov2"]
    ranges = [collection.get_segments()[0] for collection in axes.collections]
    assert [list(segment[:, 0]) for segment in ranges] == [[20, 20], [150, 150], [180, 220]]


def test_final_values_of_each_seed(found: Found) -> None:
    """Oracle: matplotlib's artists. The seeds' points as they are shown, and names only in the first panel of a row."""
    metric = found.comparison.metrics[1]
    axes = Figure().subplots()
    plots.final(axes, found, metric, named=False)
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert [50.0, 60.0] in drawn  # ov2's seeds
    assert [pytest.approx(55.0)] in drawn  # and their mean
    assert {label.get_text() for label in axes.get_yticklabels()} == {""}
    assert axes.get_title() == "probe <top-1> (%) →"


def test_a_metric_over_a_flag(found: Found) -> None:
    """Oracle: matplotlib's artists. Keep ratios 0.35 and 1.0, in order."""
    axes = Figure().subplots()
    plots.over_flag(axes, found, found.comparison.metrics[1])
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.35, 55.0], [1.0, 40.0]])
    assert axes.get_xlabel() == "keep-ratio"
