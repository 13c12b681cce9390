"""Recipes: stages from text and from files. Oracles: numbers written out, the inverse function, OpenCLIP's parser."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.params import parse_args

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe import Recipe, Stage, dump_recipe, load_recipe, parse_stage, short_count
from open_clip_ov2.recipe.counts import sample_count
from open_clip_ov2.recipe.stage import PRECISIONS, SCHEDULES


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12.8B", 12_800_000_000),
        ("1.02b", 1_020_000_000),
        ("200k", 200_000),
        ("2M", 2_000_000),
        ("0", 0),
        ("1_281_167", 1_281_167),
        ("12.811670001B", 12_811_670_001),  # a float of 12.811670001e9 would do; of the next it would not
        ("9007199.254740993B", 9_007_199_254_740_993),  # 2^53 + 1
        (7, 7),
    ],
)
def test_samples_are_exact(text: str | int, number: int) -> None:
    assert sample_count(0)(text) == number


@given(st.integers(0, 10**15), st.sampled_from(["", "K", "M", "B"]))
def test_any_count_survives_any_unit(number: int, unit: str) -> None:
    """Oracle: exact decimal division."""
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[unit]
    assert sample_count(0)(f"{Decimal(number) / scale:f}{unit}") == number


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("-2M", "expected a number of samples >= 0"),
        (-1, "expected a number of samples >= 0"),
        ("1.5", "expected an integer number"),
        ("1.0005k", "expected an integer number"),
        ("2e6", "expected a number of samples"),
        ("2MB", "expected a number of samples"),
        ("", "expected a number of samples"),
        ("9" * 5000, "expected a number of samples"),
        (2e6, "expected a number of samples"),
        (True, "expected a number of samples"),
    ],
)
def test_what_is_no_count_is_refused(value: object, part: str) -> None:
    with pytest.raises(UserError, match=part):
        sample_count(0)(value)


def test_short_counts() -> None:
    assert [short_count(n) for n in (12_811_670_000, 51_246_680, 999_600, 512)] == ["12.8 B", "51.2 M", "1 M", "512"]


def test_a_stage_from_the_command_line() -> None:
    stage = parse_stage("112:samples=2M,base_lr=8e-6,keep-ratio=0.25:1.0,train-data=s/{0,7}.tar,crop-scale=0.4:1")
    assert stage == Stage(
        resolution=112,
        samples=2_000_000,
        base_lr=8e-6,
        keep_ratio="0.25:1.0",
        train_data="s/{0,7}.tar",
        crop_scale=(0.4, 1.0),
    )


def test_a_stage_described() -> None:
    stage = Stage(84, 12_800_000_000, keep_ratio="0.35")
    assert stage.described(32_768, 1.024e-3) == "84 px, 12.8 B samples, batch 32,768, lr 1.0e-3, keep 0.35"
    assert Stage(84, 10, name="warm").described(512, 1.6e-5) == "warm: 84 px, 10 samples, batch 512, lr 1.6e-5"


def test_a_stage_as_flags() -> None:
    """Oracle: the flags, written out. What a stage switches off is left out of the flags of the run."""
    stage = Stage(84, 10, weight_decay=0.1, schedule="const", crop_scale=(0.4, 1.0), grad_checkpointing=False, name="a")
    assert stage.added_to(["--grad-checkpointing", "--lr", "1"]) == [
        "--lr", "1", "--force-image-size", "84", "--train-num-samples", "10", "--lr-scheduler", "const", "--wd", "0.1",
        "--aug-cfg", "scale=(0.4,1.0)", "--epochs", "1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("112", "begin with the resolution"),
        ("samples=2M", "begin with the resolution"),
        ("112:", "samples is missing"),
        ("x:samples=2M", "resolution: 'x': expected an integer >= 1"),
        ("0:samples=2M", "resolution: 0: expected an integer >= 1"),
        ("112:samples=0", "samples: 0: expected an integer number of samples >= 1"),
        ("112:samples=2M,samples=3M", "samples is given twice"),
        ("112:samples=2M,base_lr=1,base-lr=2", "base-lr is given twice"),
        ("112:samples=2M,lr=1e-3,base-lr=1e-6", "lr and base-lr are both given"),
        ("112:samples=2M,warmup-samples=3M", "warmup-samples 3,000,000 is more"),
        ("112:samples=2M,keep-rato=0.3", "unknown key 'keep-rato'; did you mean keep-ratio?"),
        ("112:samples=2M,keep-ratio=0", "keep-ratio: 0: expected a number > 0 and <= 1"),
        ("112:samples=2M,keep-ratio=0.5:0.2", "lower end of the range first"),
        ("112:samples=2M,global-batch=32k", "global-batch: '32k': expected an integer >= 1"),
        ("112:samples=2M,lr=nan", "lr: nan: expected a number > 0"),
        ("112:samples=2M,schedule=linear", "'linear': expected one of cosine, const, const-cooldown"),
        ("112:samples=2M,precision=fp8", "'fp8': expected one of amp"),
        ("112:samples=2M,color-jitter=maybe", "'maybe': expected true or false"),
        ("112:samples=2M,train-data=", "train-data: '': expected text"),
        ("112:samples=2M,grad-checkpointing", "expected KEY=VALUE, got 'grad-checkpointing'"),
    ],
)
def test_slips_in_a_stage_are_one_line(text: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        parse_stage(text)
    assert part in str(error.value)
    assert str(error.value).startswith(f"--stage {text}: ")
    assert "\n" not in str(error.value)


RECIPE = """
model = "ov2-vit-b-16"
[train]
beta2 = 0.95
aug_cfg = ["scale=(0.4,1.0)", "gray_scale_prob=0.2"]
local-loss = true
[[stage]]
resolution = 112
samples = "2M"
keep_ratio = [0.25, 1]
[[stage]]
resolution = 224
samples = 200_000
keep-ratio = 0.35
"""


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("\ufeff" + RECIPE, encoding="utf-8")  # some editors begin a file with a mark
    recipe = load_recipe(file)
    assert recipe == Recipe(
        "ov2-vit-b-16",
        {"beta2": 0.95, "aug-cfg": ("scale=(0.4,1.0)", "gray_scale_prob=0.2"), "local-loss": True},
        (Stage(112, 2_000_000, keep_ratio="0.25:1.0"), Stage(224, 200_000, keep_ratio="0.35")),
    )
    assert recipe.source == file


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (RECIPE, "", "no stage"),
        (RECIPE, "model = ", "not TOML"),
        (RECIPE, "stage = 3", "stage: 3: expected a list"),
        ('"2M"', '"2Q"', "stage 1: samples: '2Q': expected a number of samples"),
        ("samples = 200_000", "samples = 2e5", "stage 2: samples: 200000.0: expected a number of samples"),
        ("resolution = 224", "", "stage 2: resolution is missing"),
        ("keep-ratio = 0.35", "keep-ratio = true", "stage 2: keep-ratio: True: expected a number"),
        ("keep-ratio = 0.35", "keeps = 1", "stage 2: unknown key 'keeps'"),
        ("model", "modle", "unknown key 'modle'; did you mean model?"),
        ("model = ", "samples = 3\nmodel = ", "write it under [[stage]]"),
        ('"ov2-vit-b-16"', "7", "model: 7: expected text"),
        ("beta2 = 0.95", "samples = 3", "train: samples: every stage has its own"),
        ("beta2 = 0.95", "epochs = 3", "train: epochs: every stage has its own; write resolution and samples"),
        ("beta2 = 0.95", "schedule = 'cosine'", "its flag is called lr-scheduler"),
        ("beta2 = 0.95", "model = 'x'", "write it at the top"),
        ("beta2 = 0.95", "beta2 = nan", "expected text, a number"),
        ("beta2 = 0.95", "beta2 = 2020-01-01", "expected text, a number"),
        ("beta2 = 0.95", "beta2 = [[1]]", "expected text, a number"),
        ("local-loss = true", "aug-cfg = 'x'", "train: aug-cfg: it is given twice"),
    ],
)
def test_slips_in_a_file_are_one_line(tmp_path: Path, old: str, new: str, part: str) -> None:
    assert old in RECIPE
    file = tmp_path / "a.toml"
    file.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert str(error.value).startswith(f"{file}: ")
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_toml_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('model = "x"\n\n[[stage]\n')
    with pytest.raises(UserError, match="line 3"):
        load_recipe(tmp_path / "a.toml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"model = '\xe9'")
    for name, part in (("nowhere.toml", "No such file"), ("", "cannot be read"), ("latin.toml", "not UTF-8")):
        with pytest.raises(UserError, match=part):
            load_recipe(tmp_path / name)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-300, allow_infinity=False)
SHARES = st.floats(0.001, 1.0)
SCALARS = st.booleans() | st.integers() | FINITE | TEXTS


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    def maybe(strategy: st.SearchStrategy) -> object:
        return draw(st.none() | strategy)

    samples = draw(st.integers(1, 10**13))
    rates = draw(st.sampled_from(["lr", "base_lr"]))
    ends = sorted((draw(SHARES), draw(SHARES)))
    keep = draw(st.sampled_from([None, repr(ends[0]), f"{ends[0]!r}:{ends[1]!r}" if ends[0] < ends[1] else None]))
    scale = draw(st.sampled_from([None, tuple(ends)]))
    return Stage(
        resolution=draw(st.integers(1, 10**4)),
        samples=samples,
        global_batch=maybe(st.integers(1, 10**6)),
        batch_size=maybe(st.integers(1, 10**6)),
        **{rates: maybe(POSITIVE)},
        warmup_samples=maybe(st.integers(0, samples)),
        schedule=maybe(st.sampled_from(SCHEDULES)),
        keep_ratio=keep,
        eval_keep_ratio=maybe(SHARES),
        weight_decay=maybe(st.floats(0, 10)),
        crop_scale=scale,
        color_jitter=maybe(st.booleans()),
        precision=maybe(st.sampled_from(PRECISIONS)),
        grad_checkpointing=maybe(st.booleans()),
        context_length=maybe(st.integers(2, 10**4)),
        train_data=maybe(TEXTS),
        name=maybe(TEXTS),
    )  # type: ignore[arg-type]


FLAGS = st.dictionaries(
    st.sampled_from(["beta1", "beta2", "caption-keys", "aug-cfg-x", "local-loss", "lock-image", "workers"]),
    SCALARS | st.lists(SCALARS, min_size=1).map(tuple),
)


@given(st.builds(Recipe, st.none() | TEXTS, FLAGS, st.lists(stages(), min_size=1, max_size=3).map(tuple)))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    file = tmp_path_factory.getbasetemp() / "round-trip.toml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_choices_are_those_of_open_clip(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: what OpenCLIP's own parser says of a wrong precision, and of its schedulers in its help."""
    for argv in (["--precision", "fp8"], ["--help"]):
        with pytest.raises(SystemExit):
            parse_args(argv)
    printed = capsys.readouterr()
    choices = printed.err.split("choose from ")[-1].rstrip(")\n")
    assert tuple(choice.strip("' ") for choice in choices.split(",")) == PRECISIONS
    schedulers = printed.out.split("LR scheduler. One of: ")[-1].split("Default")[0]
    assert tuple(re.findall("'([a-z-]+)'", schedulers)) == SCHEDULES
