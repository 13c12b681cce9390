"""What is compared, and on which terms. Oracles are named at each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_clip_ov2.compare.config import Comparison
from open_clip_ov2.compare.plan import Data, runs, seconds_at, stage_samples
from open_clip_ov2.compare.reader import load_comparison
from open_clip_ov2.compare.study import as_asked
from open_clip_ov2.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "compare"
DATA = Data("train.tar", "val.tar", "train.tar", ("--wd", "0.2"))
FILE = """
{terms}
reference = "one"
[flags]
lr = 1e-3
batch-size = 32
color-jitter = true
[[arm]]
name = "one"
model = "ov2-vit-nano-8"
stages = [{{ resolution = 32, share = 0.75 }}, {{ resolution = 48, share = 0.25 }}]
[[arm]]
name = "two"
model = "clip-of-ov2-vit-nano-8"
flags = {{ lr = 5e-4, batch-size = 16 }}
stages = [{{ resolution = 48, share = 1 }}]
[[metric]]
key = "knn.top1"
"""


def load(folder: Path, text: str) -> Comparison:
    path = folder / "small.toml"
    path.write_text(text)
    return load_comparison(path)


def test_equal_samples(tmp_path: Path) -> None:
    """Oracle: by hand. Whole batches; an arm's flags win over the file's and the command line's."""
    comparison = load(tmp_path, FILE.format(terms='samples = "10k"\nseeds = [3, 5]'))
    made = runs(comparison, DATA, comparison.seeds, {}, {})
    assert [(run.arm.name, run.seed) for run in made] == [("one", 3), ("two", 3), ("one", 5), ("two", 5)]
    assert made[0].stage_samples == (7488, 2496)  # 234 and 78 batches of 32
    assert made[1].stage_samples == (10000,)
    assert made[1].argv == (
        "--model", "clip-of-ov2-vit-nano-8", "--train-data", "train.tar", "--color-jitter", "--wd", "0.2",
        "--lr", "0.0005", "--batch-size", "16", "--stage", "48:samples=10000", "--val-data", "val.tar", "--seed", "3",
    )  # fmt: skip


@given(seconds=st.floats(20, 1e4), one=st.floats(10, 1e3), two=st.floats(10, 1e3), three=st.floats(10, 1e3))
def test_equal_seconds(
    tmp_path_factory: pytest.TempPathFactory, seconds: float, one: float, two: float, three: float
) -> None:
    """Property: at the rates given, each arm takes the seconds asked for, to a batch of each stage."""
    comparison = load(tmp_path_factory.getbasetemp(), FILE.format(terms=f'mode = "seconds"\nseconds = {seconds!r}'))
    rates = {"one": (one, two), "two": (three,)}
    for arm in comparison.arms:
        counts = stage_samples(comparison, arm, rates, {})
        taken = seconds_at(sum(counts), counts, rates[arm.name])
        assert abs(taken - seconds) <= sum(32 / rate for rate in rates[arm.name])


def test_what_the_command_line_changes(tmp_path: Path) -> None:
    """Oracle: by hand."""
    text = FILE.format(terms='samples = "10k"').replace(
        "[[metric]]", '[[evaluate]]\nname = "x"\ntasks = ["knn"]\n[[metric]]'
    )
    comparison = load(tmp_path, text)
    assert comparison.evaluations[0].name == "x"
    changed = as_asked(comparison, [7], 0.25)
    assert (changed.budget, changed.seeds) == (2500, (7,))
    assert as_asked(comparison, None, 1.0) == comparison


def test_equal_flops(tmp_path: Path) -> None:
    """Oracle: by hand. 0.75 x 1 + 0.25 x 5 = 2 units an image against 5: two fifths of the samples."""
    comparison = load(tmp_path, FILE.format(terms='mode = "flops"\nsamples = "64k"'))
    flops = {"one": (1.0, 5.0), "two": (5.0,)}
    assert stage_samples(comparison, comparison.arm("one"), {}, flops) == (48_000, 16_000)
    assert stage_samples(comparison, comparison.arm("two"), {}, flops) == (25_600,)


def test_seconds_along_the_stages() -> None:
    """Oracle: by hand."""
    assert seconds_at(50, (100, 40), (10.0, 4.0)) == 5
    assert seconds_at(120, (100, 40), (10.0, 4.0)) == 15


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("reference", "referense", "referense: no such key; near: reference"),
        ('"one"\n[flags]', '"onne"\n[flags]', "reference = 'onne': no such arm; near: one"),
        ("share = 0.25", "share = 0.5", "arm one: the shares of its stages are positive and add up to 1"),
        ("share = 0.25", "shares = 0.25", "arm one: stages: shares: no such key; near: share"),
        ('name = "two"', 'name = "one"', "two arms are called 'one'"),
        ("lr = 1e-3", "seed = 1", "[flags] seed: `ov2 compare` sets it itself"),
        ('samples = "1k"', "seconds = 5", "seconds: mode 'samples' goes by samples"),
        ('samples = "1k"', 'mode = "time"', "mode = 'time': one of samples, seconds, flops"),
        ('samples = "1k"', 'samples = "1k"\nseeds = [1, 1]', "seeds = [1, 1]: different whole numbers"),
        ("[[metric]]", '[measure]\ncaption-tokens = "9:8:8"\n[[metric]]', "[measure] caption-tokens 9:8:8: 2 <= LOW"),
        ("[[metric]]", "[measure]\nmemory-limit-gb = 0\n[[metric]]", "memory-limit-gb = 0: a positive number"),
        ("[[metric]]", "[measure]\nrepetitions = 0\n[[metric]]", "[measure] repetitions: at least 1"),
        ('key = "knn.top1"', 'key = "knn.top1"\nbetter = "more"', "better = 'more': one of higher, lower"),
        ('key = "knn.top1"', 'title = "k"', "key is missing"),
        ('[[metric]]\nkey = "knn.top1"', '[curve]\nover = "lr"', "[curve]: there is no [[metric]] to draw"),
        ("[[metric]]", '[[evaluate]]\ntasks = ["knn"]\narms = ["tow"]\n[[metric]]', "'tow': no such arm; near: two"),
        ("[flags]", "[flags", "not TOML"),
    ],
)
def test_slips(tmp_path: Path, before: str, after: str, message: str) -> None:
    """One line with the file, what is wrong, and the nearest name."""
    text = FILE.format(terms='samples = "1k"')
    assert before in text
    with pytest.raises(UserError) as caught:
        load(tmp_path, text.replace(before, after, 1))
    assert message in str(caught.value)
    assert str(tmp_path / "small.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_are_fair(path: Path) -> None:
    """Oracle: the rule of the page. Arms differ in model, stages, keep ratio and optimizer, and in nothing else."""
    comparison = load_comparison(path)
    for arm in comparison.arms:
        assert set(arm.flags) <= {"keep-ratio", "decode", "lr", "opt"}, arm.name
        assert arm.flags.get("decode", "exact") == "exact"  # all that CLIP and CoCa have
    assert comparison.flags["augmentation"] == "family"
    assert "tokenizer" in comparison.flags
    assert len(comparison.seeds) == 3
