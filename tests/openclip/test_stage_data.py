"""Shards of `ov2 shards resize`, as a stage's own data and alone, through `ov2 train`."""

from __future__ import annotations

from pathlib import Path

import torch
from training import NANO, data_flags, results

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.data.loader import TrainLoader
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.run import loaders as datasets
from open_clip_ov2.recipe.run_difference import differences

RECIPE = """
model = "ov2-vit-nano-8"
[train]
force-context-length = 12
workers = 0
val-data = "{val}"
save-frequency = 1
lr = 1e-3
warmup = 1
[[stage]]
resolution = 16
samples = 16
global-batch = 8
train-data = "{small}"
[[stage]]
resolution = 24
samples = 8
global-batch = 8
train-data = "{large}"
"""


def test_each_stage_reads_its_own_data(squares: Path, tmp_path: Path, monkeypatch) -> None:
    """Oracle: the sources that the loaders of a real run were made of; the data is part of what a run is."""
    small, large = tmp_path / "small", f"{squares}/train/{{00000..00003}}.tar"
    assert ov2(["shards", "resize", "--short-side", "16", large, str(small)]) == 0
    recipe, tars = tmp_path / "r.toml", f"{small}/{{00000..00003}}.tar"
    recipe.write_text(RECIPE.format(val=f"{squares}/val/00000.tar", small=tars, large=large))
    read: list[tuple[str, int, torch.dtype]] = []

    class RecordingLoader(TrainLoader):
        def __iter__(self):
            for batch in super().__iter__():
                folder = Path(self.stream.source.urls[0]).parent.name
                read.append((folder, batch.images_BCHW.shape[-1], batch.images_BCHW.dtype))
                yield batch

    monkeypatch.setattr(datasets, "TrainLoader", RecordingLoader)
    flags = ["--recipe", str(recipe), "--logs", str(tmp_path)]
    assert ov2(["train", *flags, "--name", "run"]) == 0
    assert read == [("small", 16, torch.uint8)] * 2 + [("train", 24, torch.uint8)]
    first = parse(flags)
    recipe.write_text(recipe.read_text().replace(tars, large))
    second = parse(flags)
    assert first.name != second.name
    assert differences(first.config, second.config) == [f"stage 1 train_data: {tars} before, {large} now"]


def test_the_number_of_samples_is_known(squares: Path, tmp_path: Path) -> None:
    """Oracle: sizes.json says 32, which are four steps of eight; --decode is part of what a run is."""
    assert (
        ov2(["shards", "resize", "--short-side", "16", f"{squares}/train/{{00000..00003}}.tar", str(tmp_path / "s")])
        == 0
    )
    flags = data_flags(squares)
    flags[flags.index("--train-data") + 1] = f"{tmp_path}/s/{{00000..00003}}.tar"
    place = flags.index("--train-num-samples")
    flags = [*NANO, *flags[:place], *flags[place + 2 :], "--logs", str(tmp_path), "--log-every-n-steps", "1"]
    assert ov2(["train", *flags, "--name", "run"]) == 0
    assert [row["samples_seen"] for row in results(tmp_path / "run", "train")] == [8, 16, 24, 32]
    assert parse(flags).name != parse([*flags, "--decode", "exact"]).name


def test_fast_decoding_is_refused_where_the_crop_is_not_ours(squares: Path, tmp_path: Path, capsys) -> None:
    """Oracle: the flag in one line."""
    flags = [*NANO, *data_flags(squares), "--logs", str(tmp_path), "--aug-cfg", "use_timm=True", "--decode", "fast"]
    assert ov2(["train", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--decode fast" in error
