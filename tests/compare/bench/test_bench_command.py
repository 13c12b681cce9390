"""`ov2 bench` and `ov2 bench data` as users run them, tiny. Oracles: the files; relations that hold on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from open_clip_ov2.cli import main


def test_all_variants_in_turns_and_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "bench", "--model", "ov2-bench-tiny", "--resolution", "16", "--precision", "fp32", "--batch-size", "4",
        "--caption-tokens", "4:16:8", "--repetitions", "2", "--steps", "2", "--device", "cpu", "--threads", "1",
        "--arms", "ov2,coca,clip", "--out", str(tmp_path),
    ]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr()
    plain = json.loads((tmp_path / "bench.json").read_text())
    assert [one["arm"] for one in plain["measured"]] == plain["settings"]["arms"] == ["ov2", "coca", "clip"]
    for one in plain["measured"]:
        assert one["failure"] is None
        assert len(one["step_s"]) == 2
        assert min(one["step_s"]) > 0
        assert one["utilisation"] > 0
    ours, coca, _ = plain["measured"]
    assert ours["model"] == "ov2-bench-tiny"
    assert ours["time_ratio"]["median"] == 1.0
    # CoCa pools into 256 tokens here where ov2 keeps one of four patches.
    assert coca["step_bytes"] > 2 * ours["step_bytes"] > 0
    assert coca["image_flops"] > ours["image_flops"]
    assert plain["peak_flops"]["fp32"] > 0
    assert (tmp_path / "bench.md").read_text() in printed.out


def test_pipeline_by_stage(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the sum of the parts is what the table says of all of them."""
    threads = torch.get_num_threads()
    try:
        status = main(
            ["bench", "data", "--train-data", f"{squares}/train/{{00000..00003}}.tar", "--model", "ov2-vit-nano-8",
             "--resolution", "32", "--samples", "24", "--batch-size", "8", "--workers", "0"]
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) > 1}
    parts = ["read", "choose a caption", "decode, crop, transform", "tokenize", "collate"]
    total = sum(float(table[part][0]) for part in parts)
    assert float(table["all of them"][0]) == pytest.approx(total, abs=0.004)  # five figures rounded to 0.001
    assert float(table["in the main process"][0].replace(",", "")) > 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--precision", "fp8"], "--precision: 'fp8': expected one of fp32, amp"),
        (["--resolution", "84,x"], "--resolution: 'x': expected an integer >= 1"),
        (["--repetitions", "0"], "--repetitions: 0: expected an integer >= 1"),
        (["--caption-tokens", "9:8:8"], "--caption-tokens: 9:8:8: expected 2 <= LOW"),
        (["--device", "cpu", "--largest-batch"], "on a CPU it needs --memory-limit-gb"),
        (["--memory-budget", "0.5"], "--memory-budget 0.5: it needs --compile"),
        (["data"], "--train-data"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], expected: str, capsys: Any) -> None:
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert expected in err
    assert "\n" not in err
