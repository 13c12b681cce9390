"""The examples of CONTRIBUTING.md. Oracle: each is run in the file that it names, and then used through `ov2`."""

from __future__ import annotations

import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from export_fixtures import make_run

import open_clip_ov2
from open_clip_ov2.argv import Parser
from open_clip_ov2.cli import main
from open_clip_ov2.evaluate.tasks import TASKS
from open_clip_ov2.formats.targets import TARGETS
from open_clip_ov2.tracking.sinks import TRACKERS

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {
    path: code for path, code in re.findall(r"^```python\n# src/(\S+)\.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}


def run_example(path: str) -> dict[str, Any]:
    """The names of the file, if it is there, and of the example that is added to it."""
    module = path.replace("/", ".")
    names = dict(vars(import_module(module))) if find_spec(module) else {"__name__": module}
    exec(compile(EXAMPLES[path], f"CONTRIBUTING.md, {path}", "exec"), names)
    return names


def test_all_examples_are_tested() -> None:
    assert len(EXAMPLES) == 4
    assert PAGE.count("```python") + PAGE.count("```json") == 5


def test_a_flag() -> None:
    names = run_example("open_clip_ov2/openclip/command/flags")
    parser, options = Parser(prog="ov2 train"), names["TrainOptions"]
    names["add_flags"](parser, options)
    assert parser.parse_args(["--image-noise", "0.1"]).image_noise == 0.1
    assert parser.parse_args([]).image_noise == options().image_noise == 0.0
    assert "standard deviation of noise" in parser.format_help()


def test_a_model_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    name = "ov2-vit-ti-32"
    (tmp_path / f"{name}.json").write_text(found)
    open_clip.add_model_config(tmp_path)
    try:
        model = open_clip.create_model(name)
        assert main(["plan", "--model", name, "--stage", "224:samples=1M", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path)
        open_clip.factory._rescan_model_configs()
    assert plan["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_task_and_a_tracker(squares: Path, tmp_path: Path) -> None:
    """One short run with both: the tracker's file has the losses of results.jsonl, and the task its result there."""
    run_example("open_clip_ov2/evaluate/tasks")
    run_example("open_clip_ov2/tracking/sinks")
    try:
        flags = {
            "model": "ov2-vit-nano-8",
            "stage": "24:samples=32,context-length=12",
            "train_data": f"{squares}/train/{{00000..00003}}.tar",
            "val_data": f"{squares}/val/00000.tar",
            "batch_size": 8,
            "lr": 1e-3,
            "warmup": 1,
            "workers": 0,
            "log_every_n_steps": 1,
            "report_to": "loss-file",
            "eval": f"--tasks caption-length --data {squares}/val/00000.tar",
            "logs": tmp_path,
            "name": "run",
        }
        open_clip_ov2.train(flags)
    finally:
        TASKS.pop("caption-length")
        TRACKERS.pop("loss-file")
    records = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    losses = [f"{row['samples_seen']},{row['loss']:.4f}" for row in records if row["kind"] == "train"]
    assert (tmp_path / "run" / "loss.csv").read_text().splitlines() == losses
    assert any("caption-length/words" in name for row in records for name in row)


def test_an_export_target(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    TARGETS["npz"] = run_example("open_clip_ov2/formats/npz")["TARGET"]
    try:
        assert main(["export", str(run.folder), "--to", "npz", "--out", str(tmp_path / "out")]) == 0
    finally:
        TARGETS.pop("npz")
    with np.load(tmp_path / "out" / "encoder.npz") as weights:
        kernel = run.model.visual.conv1.weight.detach().numpy()
        assert np.array_equal(weights["conv1.weight"], kernel)
    assert "np.load" in (tmp_path / "out" / "README.md").read_text()
