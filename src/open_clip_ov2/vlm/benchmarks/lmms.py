"""lmms-eval as a process in an environment of its own (`scripts/setup_lmms.sh`), with data from this disk.

Prompts and scoring are lmms-eval's: a task of ours includes its own by path and names other files. Measured with
lmms-eval 0.7.3.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_clip_ov2.errors import RunFailed, UserError, unknown_key
from open_clip_ov2.files import read_json, write_text

VARIABLE = "OV2_LMMS"
SETUP = "bash scripts/setup_lmms.sh FOLDER makes one"


class LmmsTask(NamedTuple):
    """`file`: of the stock task, in lmms-eval's tasks. `metrics`: ours, and the factor to its unit, by its own."""

    file: str
    split: str
    metrics: Mapping[str, tuple[str, float]]


TASKS = {
    "textvqa": LmmsTask("textvqa/textvqa_val.yaml", "validation", {"exact_match": ("textvqa", 100)}),
    "chartqa": LmmsTask("chartqa/chartqa.yaml", "test", {"relaxed_overall": ("chartqa", 100)}),
    "ocrbench": LmmsTask("ocrbench/ocrbench.yaml", "test", {"ocrbench_accuracy": ("ocrbench", 1000)}),
    "mme": LmmsTask(
        "mme/mme.yaml", "test",
        {"mme_perception_score": ("mme_perception", 1), "mme_cognition_score": ("mme_cognition", 1)},
    ),
    "seed": LmmsTask(
        "seedbench/seedbench.yaml", "test", {"seed_image": ("seed", 100), "seed_all": ("seed_all", 100)}
    ),
    "sqa": LmmsTask("scienceqa/scienceqa_img.yaml", "test", {"exact_match": ("sqa", 100)}),
    "gqa": LmmsTask("gqa/gqa.yaml", "testdev", {"exact_match": ("gqa", 100)}),
    "pope": LmmsTask("pope/pope.yaml", "test", {"pope_accuracy": ("pope", 100), "pope_f1_score": ("pope_f1", 100)}),
}  # fmt: skip


# How lmms-eval 0.7.3 asks TextVQA, but with its option `ocr` on.
WITH_OCR_TOKENS = {
    "default": {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase.", "ocr": True}
}


def task_name(name: str) -> str:
    """Raises UserError if it is unknown."""
    if name not in TASKS:
        raise unknown_key("lmms-eval", name, TASKS, "task")
    return name


def find_environment(given: Path | None) -> Path:
    """The environment of --lmms or of OV2_LMMS. Raises UserError."""
    folder = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if folder is None:
        raise UserError(f"--tasks needs --lmms FOLDER (or {VARIABLE}), an environment with lmms-eval; {SETUP}")
    if not (folder / "bin" / "python").exists() or not _stock_tasks(folder).is_dir():
        raise UserError(f"--lmms {folder}: no environment with lmms-eval; {SETUP}")
    return folder


def _stock_tasks(environment: Path) -> Path:
    found = sorted(environment.glob("lib/python3*/site-packages/lmms_eval/tasks"))
    return found[0] if found else environment / "lib" / "lmms_eval"


def write_tasks(
    names: Sequence[str], environment: Path, data: Path | None, folder: Path, ocr_tokens: bool = False
) -> None:
    """Task files `ov2_NAME` for the parquet files `data/NAME/*.parquet` or, without `data`, for the hub's. Raises
    UserError, OSError."""
    for name in names:
        task = TASKS[name]
        stock = (_stock_tasks(environment) / task.file).resolve()
        lines: dict[str, Any] = {"include": str(stock), "task": f"ov2_{name}"}
        if data is not None:
            files = sorted((data / name).glob("*.parquet"))
            if not files:
                raise UserError(f"--data {data}: no {name}/*.parquet (the data set's own files, as the hub has them)")
            data_files = {task.split: [str(path.resolve()) for path in files]}
            lines |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": data_files}}
            if name == "gqa":  # its own fetches the pictures from the hub: here each question's row has its picture
                lines["process_docs"] = None
        if name == "textvqa" and ocr_tokens:
            lines["lmms_eval_specific_kwargs"] = WITH_OCR_TOKENS
        text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items())  # JSON is YAML
        write_text(folder / f"ov2_{name}.yaml", text + "\n")


def command(
    environment: Path, model: Path, names: Sequence[str], out: Path, include: Path, device: str, limit: int | None
) -> list[str]:
    """How lmms-eval is run: one process, batches of one, as its `llava_hf` wants them."""
    words = [
        str(environment.absolute() / "bin" / "python"), "-m", "lmms_eval", "--model", "llava_hf",
        "--model_args", f"pretrained={model.resolve()},device_map={device},attn_implementation=sdpa",
        "--tasks", ",".join(f"ov2_{name}" for name in names), "--include_path", str(include.resolve()),
        "--batch_size", "1", "--output_path", str(out.resolve()), "--log_samples", "--device", device,
    ]  # fmt: skip
    return words + (["--limit", str(limit)] if limit else [])


def run(words: Sequence[str], out: Path, *, offline: bool) -> Path:
    """Run it, with its log in `out/log.txt`; its file of results. Raises RunFailed with the last lines."""
    out.mkdir(parents=True, exist_ok=True)
    before, log = set(out.rglob("*_results.json")), out / "log.txt"
    hub = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {}
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("w") as file:
        status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env={**own, **hub}).returncode
    new = sorted(set(out.rglob("*_results.json")) - before, key=lambda path: path.stat().st_mtime)
    if status or not new:
        with log.open(errors="replace") as file:
            last = " | ".join(line.strip() for line in deque(file, 3))
        raise RunFailed(
            f"lmms-eval ended with status {status} and {len(new)} files of results; {log} ends with: {last}"
        )
    return new[-1]


def read_scores(file: Path, names: Sequence[str]) -> dict[str, float]:
    """Scores in the papers' units by our names. Raises UserError if one is missing."""
    results = read_json(file, dict, "lmms-eval's results").get("results", {})
    scores = {}
    for name in names:
        found = results.get(f"ov2_{name}") or {}
        for metric, (ours, factor) in TASKS[name].metrics.items():
            value = found.get(f"{metric},none")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                scores[ours] = factor * float(value)
        if next(iter(TASKS[name].metrics.values()))[0] not in scores:
            raise UserError(f"{file}: no result of {name}; the file has {', '.join(results) or 'none'}")
    return scores
