"""What is compared, and on which terms. Oracles are named at each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import variant_result

from open_clip_ov2.compare.config import Comparison, load_comparison
from open_clip_ov2.compare.plan import Study, runs, search_runs, with_rates
from open_clip_ov2.errors import UserError
from open_clip_ov2.training import planned_run

CONFIGS = Path(__file__).parents[2] / "configs" / "compare"
STUDY = Study((), "train.tar", "val.tar", "train.tar", ("--wd", "0.2"), Path("out"), Path("logs"))
FILE = """
{terms}
reference = "one"
[flags]
lr = 1e-3
batch-size = 32
color-jitter = true
[[variant]]
name = "one"
model = "ov2-vit-nano-8"
stages = [{{ resolution = 32, share = 0.75 }}, {{ resolution = 48, share = 0.25 }}]
[[variant]]
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
    """Oracle: by hand. Whole batches; a variant's flags win over the file's and the command line's."""
    comparison = load(tmp_path, FILE.format(terms='samples = "10k"\nseeds = [3, 5]'))
    made = runs(STUDY, comparison, {}, {})
    assert [(run.variant.name, run.seed) for run in made] == [("one", 3), ("two", 3), ("one", 5), ("two", 5)]
    assert made[0].stage_samples == (7488, 2496)  # 234 and 78 batches of 32
    assert made[1].stage_samples == (10000,)
    assert made[1].argv == (
        "--model", "clip-of-ov2-vit-nano-8", "--train-data", "train.tar", "--color-jitter", "--wd", "0.2",
        "--lr", "0.0005", "--batch-size", "16", "--stage", "48:samples=10000", "--val-data", "val.tar", "--seed", "3",
    )  # fmt: skip


def test_the_best_run_of_a_search_is_the_first_seeds(tmp_path: Path) -> None:
    """Oracle: the name of a run, which is that of its configuration: `ov2 train` does not train it again."""
    text = FILE.format(terms='samples = "10k"').replace("lr = 5e-4, ", "").replace("color-jitter = true\n", "")
    comparison = load(tmp_path, text + "[search]\nlr = [1e-3, 3e-3]\n")
    tried = search_runs(STUDY, comparison, {}, {})
    assert [(name, lr) for name, lr, _ in tried] == [("one", 1e-3), ("one", 3e-3), ("two", 1e-3), ("two", 3e-3)]
    chosen = with_rates(comparison, {"one": {1e-3: 2.0, 3e-3: 1.0}, "two": {1e-3: 1.0, 3e-3: 2.0}})
    names = [planned_run(["--logs", str(tmp_path), *run.argv]).name for run in runs(STUDY, chosen, {}, {})]
    of_search = [planned_run(["--logs", str(tmp_path), *run.argv]).name for _, _, run in tried]
    assert names[:2] == [of_search[1], of_search[2]]
    assert len(set(names + of_search)) == len(names) + 2


@given(seconds=st.floats(20, 1e4), one=st.floats(10, 1e3), two=st.floats(10, 1e3), three=st.floats(10, 1e3))
def test_equal_seconds(
    tmp_path_factory: pytest.TempPathFactory, seconds: float, one: float, two: float, three: float
) -> None:
    """Property: at the rates given, each variant takes the seconds asked for, to a batch of each stage."""
    comparison = load(tmp_path_factory.getbasetemp(), FILE.format(terms=f'mode = "seconds"\nseconds = {seconds!r}'))
    rates = {"one": (one, two), "two": (three,)}
    for run in runs(STUDY, comparison, rates, {})[:2]:
        own = rates[run.variant.name]
        result = variant_result(run.variant.name, (1.0,), stage_samples=run.stage_samples, stage_rates=own)
        assert abs(result.seconds - seconds) <= sum(32 / rate for rate in own)


def test_what_the_command_line_changes(tmp_path: Path) -> None:
    """Oracle: by hand."""
    text = FILE.format(terms='samples = "10k"').replace(
        "[[metric]]", '[[evaluate]]\nname = "x"\ntasks = ["knn"]\n[[metric]]'
    )
    comparison = load(tmp_path, text)
    assert comparison.evaluations[0].name == "x"
    changed = comparison.scaled([7], 0.25)
    assert (changed.budget, changed.seeds) == (2500, (7,))
    assert comparison.scaled(None, 1.0) == comparison


def test_a_baseline_is_no_variant(tmp_path: Path) -> None:
    """Oracle: by hand. It has a name of its own and a file of results."""
    text = FILE.format(terms='samples = "1k"') + '[[baseline]]\nname = "pixels"\nresults = "p.json"\n'
    assert [(one.name, one.results) for one in load(tmp_path, text).baselines] == [("pixels", "p.json")]
    with pytest.raises(UserError, match="two variants have the name 'two'"):
        load(tmp_path, text.replace('"pixels"', '"two"'))


def test_former_names_are_accepted(tmp_path: Path) -> None:
    """Oracle: the same file with today's names. Files of 0.1 have [[arm]], and `arms` in [[evaluate]]."""
    text = FILE.format(terms='samples = "1k"') + '[[evaluate]]\ntasks = ["knn"]\nvariants = ["two"]\n'
    former = text.replace("[[variant]]", "[[arm]]").replace("variants = [", "arms = [")
    assert load(tmp_path, former) == load(tmp_path, text)
    both = former + '[[variant]]\nname = "three"\nmodel = "ov2-vit-nano-8"\n'
    with pytest.raises(UserError, match="given twice"):
        load(tmp_path, both)


def test_equal_flops(tmp_path: Path) -> None:
    """Oracle: by hand. 0.75 x 1 + 0.25 x 5 = 2 units an image against 5: two fifths of the samples."""
    comparison = load(tmp_path, FILE.format(terms='mode = "flops"\nsamples = "64k"'))
    flops = {"one": (1.0, 5.0), "two": (5.0,)}
    assert [run.stage_samples for run in runs(STUDY, comparison, {}, flops)[:2]] == [(48_000, 16_000), (25_600,)]


def test_seconds_along_the_stages() -> None:
    """Oracle: by hand."""
    result = variant_result("one", (1.0,), stage_samples=(100, 40), stage_rates=(10.0, 4.0))
    assert result.seconds_at(50) == 5
    assert result.seconds_at(120) == 15


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("reference", "referense", "unknown key 'referense'; did you mean reference?"),
        ('"one"\n[flags]', '"onne"\n[flags]', "there is no variant 'onne'; did you mean one?"),
        ("share = 0.25", "share = 0.5", "variant: one: stages: the shares must add up to 1"),
        ("share = 0.25", "shares = 0.25", "variant: one: stages: number 2: unknown key 'shares'; did you mean share?"),
        ('name = "two"', 'name = "one"', "two variants have the name 'one'"),
        ("lr = 1e-3", "seed = 1", "flags: seed: `ov2 compare` sets it"),
        ('samples = "1k"', "seconds = 5", "seconds: mode 'samples' needs samples instead"),
        ('samples = "1k"', 'mode = "time"', "mode: 'time': expected one of samples, seconds, flops"),
        ('samples = "1k"', 'samples = "1k"\nseeds = [1, 1]', "seeds: [1, 1]: expected one or more different numbers"),
        (
            "[[metric]]",
            '[measure]\ncaption-tokens = "9:8:8"\n[[metric]]',
            "caption-tokens: 9:8:8: expected 2 <=",
        ),
        ("[[metric]]", "[measure]\nmemory-limit-gb = 0\n[[metric]]", "memory-limit-gb: 0: expected a number > 0"),
        ("[[metric]]", "[measure]\nrepetitions = 0\n[[metric]]", "repetitions: 0: expected an integer >= 1"),
        (
            'key = "knn.top1"',
            'key = "knn.top1"\nbetter = "more"',
            "metric: knn.top1: better: 'more': expected",
        ),
        ('key = "knn.top1"', 'title = "k"', "key is missing"),
        (
            'key = "knn.top1"',
            'key = "knn.top1"\n[[evaluate]]\ntasks = ["knn"]\nvariants = ["one"]\n'
            '[[question]]\na = "one"\nb = "two"\nmetric = "knn.top1"\ntext = "?"',
            "question: knn.top1 of 'two': its [[evaluate]] leaves this variant out",
        ),
        ('[[metric]]\nkey = "knn.top1"', '[curve]\nover = "lr"', "curve: there is no [[metric]] to draw"),
        (
            "[[metric]]",
            '[[evaluate]]\ntasks = ["knn"]\narms = ["tow"]\n[[metric]]',
            "no variant 'tow'; did you mean two?",
        ),
        ("[flags]", "[flags", "not TOML"),
    ],
)
def test_mistakes(tmp_path: Path, before: str, after: str, message: str) -> None:
    """One line with the file, what is wrong, and the nearest name."""
    text = FILE.format(terms='samples = "1k"')
    assert before in text
    with pytest.raises(UserError) as caught:
        load(tmp_path, text.replace(before, after, 1))
    assert message in str(caught.value)
    assert str(tmp_path / "small.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


STUDIES = sorted(path for path in CONFIGS.glob("*.toml") if not path.stem.startswith("study"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_are_fair(path: Path) -> None:
    """Oracle: the rule of the page. Variants differ in model, loss, stages, keep ratio, captions and optimizer, and
    in nothing else."""
    comparison = load_comparison(path)
    for variant in comparison.variants:
        assert set(variant.flags) <= {"keep-ratio", "decode", "lr", "opt", "siglip", "captions", "caption-keys"}, (
            variant.name
        )
        assert variant.flags.get("decode", "exact") == "exact"  # all that CLIP and CoCa have
    assert comparison.flags["augmentation"] == "family"
    assert "tokenizer" in comparison.flags or path.stem == "own-data"  # OpenCLIP's for all three there
    assert len(comparison.seeds) == (1 if path.stem == "gpu" else 3)  # twelve minutes on a GPU are enough for one


def test_a_file_that_leads_back_to_itself(tmp_path: Path) -> None:
    """Oracle: the message; before, Python's recursion ended it."""
    (tmp_path / "a.toml").write_text('base = "b.toml"')
    (tmp_path / "b.toml").write_text('base = "a.toml"')
    for name in ("a.toml", "b.toml"):
        with pytest.raises(UserError, match=rf"{name}: its base leads back to it"):
            load_comparison(tmp_path / name)
