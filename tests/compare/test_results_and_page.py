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
from made_up import LOSS, variant_result
from matplotlib.figure import Figure

from open_clip_ov2.compare import page, plots, results
from open_clip_ov2.compare.answers import Answer, Outcomes, answers, differences, stacked
from open_clip_ov2.compare.config import Metric, Question
from open_clip_ov2.compare.plan import final_loss, with_rates
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
from open_clip_ov2.errors import UserError

VOID = {"meta", "path", "use", "rect", "br", "link", "img"}


def test_summary() -> None:
    """Oracle: numpy."""
    values = np.random.default_rng(0).normal(size=7).tolist()
    found_summary = summary(values)
    assert found_summary.sd == pytest.approx(np.std(values, ddof=1))
    assert found_summary.mean == pytest.approx(np.mean(values))
    assert summary([1.0]) == Summary(1.0, None)


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
    assert page.with_bold(page.table(found)).splitlines() == [
        "|  | images/s | × ov2 | step memory, MiB | largest batch | samples | training, s | caption loss (nats) ↓ "
        "| probe <top-1> (%) ↑ |",
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


def test_baselines_are_rows_of_their_own(found: Found) -> None:
    """Oracle: by hand. They have what their file has and nothing else, and bold is between variants alone."""
    known = replace(found, baselines={"pixels": {"probe.top1": 0.9, "other": 1.0}})
    rows = page.with_bold(page.table(known)).splitlines()
    assert rows[:-1] == page.with_bold(page.table(found)).splitlines()
    assert rows[-1] == "| pixels | – | – | – | – | – | – | – | 90.0 |"
    (line,) = (row for row in csv.DictReader(io.StringIO(results.as_csv([known]))) if row["arm"] == "pixels")
    assert (line["quantity"], line["unit"], line["mean"], line["values"]) == ("probe.top1", "%", "90", "90")
    assert json.loads(json.dumps(as_json([known])))[0]["baselines"]["pixels"]["probe.top1"] == 0.9


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
        "small-caption-loss-over-samples", "small-caption-loss-over-seconds", "small-caption-loss-at-the-end",
        "small-caption-loss-over-keep-ratio", "small-probe-top1-at-the-end", "small-probe-top1-over-keep-ratio",
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


# --- the answers ---------------------------------------------------------------------------------------


def right(means: tuple[float, ...], pictures: int = 400) -> Outcomes:
    """0 or 1 for each picture, exactly so many right, the same pictures right in the same order for each seed."""
    values = [[1.0] * round(mean * pictures) + [0.0] * (pictures - round(mean * pictures)) for mean in means]
    return Outcomes(tuple(map(str, range(pictures))), np.array(values))


def asked(found: Found, a: Outcomes, b: Outcomes) -> Answer:
    question = Question("ov2", "CLIP", "probe.top1", "Is ov2 better?")
    comparison = replace(found.comparison, questions=(question,))
    (answer,) = answers(comparison, {"ov2": {"probe.top1": a}, "CLIP": {"probe.top1": b}})
    return answer


def test_the_interval_is_that_of_known_errors() -> None:
    """Oracles: for one seed each, the standard error of a mean of paired differences; for seeds that differ and
    pictures that do not, that of a difference of means of n seeds with n - 1 in the variance."""
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 500)), rng.random((1, 500))
    drawn = differences(a, b, draws=20_000)
    assert drawn.mean() == pytest.approx((a - b).mean(), abs=1e-3)
    assert drawn.std() == pytest.approx((a - b).std() / 500**0.5, rel=0.03)
    seeds_a, seeds_b = np.array([0.3, 0.4, 0.8]), np.array([0.1, 0.2, 0.2])
    drawn = differences(np.tile(seeds_a[:, None], 7), np.tile(seeds_b[:, None], 7), draws=20_000)
    error = (seeds_a.var(ddof=1) / 3 + seeds_b.var(ddof=1) / 3) ** 0.5
    assert drawn.std() == pytest.approx(error, rel=0.03)


def test_the_interval_covers_the_truth() -> None:
    """Oracle: 300 made-up studies of known difference, with seeds and pictures at random; 95% of the intervals should
    hold it, and with four seeds a bootstrap holds a little less."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(300):
        a = rng.normal(0.5, 0.05, (4, 1)) + rng.normal(0, 0.4, (1, 100)) + rng.normal(0, 0.2, (4, 100))
        b = rng.normal(0.4, 0.05, (4, 1)) + rng.normal(0, 0.4, (1, 100)) + rng.normal(0, 0.2, (4, 100))
        low, high = np.quantile(differences(a, b, draws=400), [0.025, 0.975])
        held += low < 0.1 < high
    assert 0.88 < held / 300 < 0.99


def test_a_clear_answer_and_none(found: Found) -> None:
    """Oracle: by hand: 60 and 40% of 400 pictures, and 50 and 49%; the other way round where b is better."""
    clear = asked(found, right((0.6, 0.61, 0.59)), right((0.4, 0.41, 0.39)))
    assert clear.sentence.startswith(
        "Is ov2 better? Yes: ov2 60.0 against CLIP 40.0% on probe <top-1>, a difference of +20.0 points (95% interval 1"
    )
    assert clear.sentence.endswith("; 400 images, 3 seeds).")
    assert clear.difference / clear.error > 3
    assert asked(found, right((0.4,)), right((0.6,))).sentence.startswith("Is ov2 better? No, the other way round: ")
    assert "which says nothing of how seeds differ" in asked(found, right((0.4,)), right((0.6,))).sentence
    near = asked(found, right((0.5, 0.55)), right((0.49, 0.48)))
    assert near.better == 0
    assert near.low < 0 < near.high
    assert " Cannot tell: " in near.sentence


def test_where_only_seeds_are_known(found: Found) -> None:
    """Oracle: by hand. Without questions in the file the reference is set against each other variant, on the first
    metric that both have; lower is better for a loss; one number each tells nothing; NaN tells nothing."""

    def losses(*values: float) -> dict[str, Outcomes]:
        return {"caption_loss": Outcomes(None, np.array(values)[:, None])}

    (answer,) = answers(found.comparison, {"ov2": losses(1.0, 1.1, 1.2), "CLIP": losses(2.0, 2.1, 2.2)})
    assert (answer.better, answer.question.a, answer.question.b, answer.metric) == (1, "ov2", "CLIP", LOSS)
    assert "a difference of -1.00 nats (95% interval -1." in answer.sentence
    assert "; 3 seeds alone)." in answer.sentence
    (one,) = answers(found.comparison, {"ov2": losses(1.0), "CLIP": losses(2.0)})
    (diverged,) = answers(found.comparison, {"ov2": losses(1.0, float("nan")), "CLIP": losses(2.0, 2.0)})
    assert one.better == diverged.better == 0
    assert answers(found.comparison, {"ov2": losses(1.0), "CLIP": {}}) == ()


def test_other_pictures_cannot_be_compared(found: Found) -> None:
    few = right((0.5,), pictures=10)
    with pytest.raises(UserError, match="evaluated on different images"):
        asked(found, right((0.5,)), few)
    with pytest.raises(UserError, match="seeds were evaluated on different images"):
        stacked([(np.array(["a"]), np.ones(1)), (np.array(["b"]), np.ones(1))], "ov2: knn.top1")
    comparison = replace(found.comparison, questions=(Question("ov2", "CLIP", "probe.top1", "Which?"),))
    with pytest.raises(UserError, match=r"CLIP has no values of probe\.top1"):
        answers(comparison, {"ov2": {"probe.top1": few}})


def test_page_and_markdown_begin_with_the_answers(found: Found) -> None:
    """Oracle: the sentence itself is the first paragraph, then the chart; the search's best rates are marked, and
    the variants named whose best is an end of those that were searched."""
    answer = asked(found, right((0.6, 0.6)), right((0.4, 0.4)))
    searched = {"ov2": {5e-4: 2.5, 1e-3: 2.0, 2e-3: 1.5}, "CLIP": {1e-3: 2.0, 2e-3: 1.5, 4e-3: 1.7}}
    full = replace(found, answers=(answer,), searched=searched)
    text = page.page("All", [full], "ov2 compare")
    first = re.search(r"<p[^>]*>(.*?)</p>", text, flags=re.DOTALL)
    assert first is not None
    assert html.unescape(first.group(1)) == answer.sentence
    assert text.index('id="answers-0"') < text.index("<h2>Method") < text.index('id="small"')
    markdown = page.results_md("All", [full], "ov2 compare")
    assert markdown.splitlines()[2] == f"- {answer.sentence}"
    assert "| ov2 | 2.500 | 2.000 | **1.500** | – |" in markdown
    assert page.summary_md([full, found]).splitlines() == [
        "### Small & fair", "",
        "|  | images/s | samples | caption loss (nats) ↓ | probe <top-1> (%) ↑ |", "| --- | --- | --- | --- | --- |",
        "| ov2 | 200 (180–220) | 4 K | 2.10 ± 0.14 | **55.0 ± 7.1** |", "| CLIP | 150 | 4 K | – | 40.0 ± 0.0 |",
        "| stock | 20 | – | – | – |", "",
        f"- {answer.question.text} **Yes**: +20.0 points ({answer.low:.1f} to {answer.high:.1f}).", "",
        *page.summary_md([found]).splitlines(),
    ]  # fmt: skip
    assert "an end of which was best: ov2." in markdown
    assert as_json([full])[0]["answers"][0]["sentence"] == answer.sentence


def test_the_search_takes_the_lowest_last_loss(found: Found) -> None:
    """Oracle: by hand: the mean over the last fifth of the samples; a diverged run is never taken."""
    rows = [{"kind": "train", "samples_seen": seen, "loss": seen / 10} for seen in range(10, 101, 10)]
    assert final_loss([*rows, {"kind": "val", "samples_seen": 100, "loss": 0.0}]) == 9.5
    rows[-1]["loss"] = None
    assert final_loss(rows) == float("inf")
    chosen = with_rates(found.comparison, {"ov2": {1e-3: 2.0, 3e-3: 1.0, 1e-2: float("inf")}})
    assert [variant.flags.get("lr") for variant in chosen.variants] == [3e-3, None, None]


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


def test_final_values_of_each_seed(found: Found) -> None:
    """Oracle: matplotlib's artists. The seeds' points as they are shown, the first variant on top."""
    metric = found.comparison.metrics[1]
    axes = Figure().subplots()
    plots.final(axes, found, metric)
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert [50.0, 60.0] in drawn  # ov2's seeds
    assert [pytest.approx(55.0)] in drawn  # and their mean
    assert [label.get_text() for label in axes.get_yticklabels()] == ["CLIP", "ov2"]
    assert axes.get_title() == "probe <top-1> (%) →"


def test_a_metric_over_a_flag(found: Found) -> None:
    """Oracle: matplotlib's artists. Keep ratios 0.35 and 1.0, in order."""
    axes = Figure().subplots()
    plots.over_flag(axes, found, found.comparison.metrics[1])
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.35, 55.0], [1.0, 40.0]])
    assert axes.get_xlabel() == "keep-ratio"
