"""What lies in the folder of a run of `ov2 vlm train`.

run.json                  what makes it this run, and its command
data/NAME/                the usable conversations of a data set, and which were left out
stages/0, stages/1, ...   the model before the first stage, and after each; the last one becomes the run's folder itself
checkpoints/stage_N/      checkpoints within stage N
config.json, *.safetensors, chat_template.jinja, ...   the finished model, as transformers opens it
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import TEMPORARY, read_json, write_json
from open_clip_ov2.locks import LOCK
from open_clip_ov2.recipe.run_difference import differences
from open_clip_ov2.tracking.status import EARLIER
from open_clip_ov2.vlm.vlm_options import VlmPlan

RUN_FILE, COMPLETE, MODEL_CONFIG = "run.json", "complete.json", "config.json"


def enter(plan: VlmPlan) -> None:
    """Begin the run in its folder, or find it again. Raises UserError if the folder is another run's, or none."""
    check_same_run(plan)
    file, earlier = plan.folder / RUN_FILE, (TEMPORARY, LOCK, *EARLIER)
    others = [path.name for path in plan.folder.glob("*") if not path.name.startswith(earlier)]
    if others and not file.is_file():
        raise UserError(f"--out {plan.folder}: exists and is not a run of ov2 vlm (it holds {others[0]}); name another")
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "open_clip_ov2")}
    recipe = Path(plan.options.recipe).name.removesuffix(".toml")
    about = {"config": plan.config, "recipe": recipe, "versions": versions}
    write_json(file, {**about, "command": ["ov2", "vlm", "train", *plan.argv]})


def check_same_run(plan: VlmPlan) -> None:
    """Raises UserError if the run exists and has another configuration."""
    file = plan.folder / RUN_FILE
    if not file.is_file():
        return
    before: dict[str, Any] = read_json(file, dict).get("config", {})
    if before.get("encoder") is None:
        raise UserError(f"--out {plan.folder}: not a run of ov2 vlm; name another folder")
    if changes := differences(before, plan.config):
        raise UserError(f"--out {plan.folder}: this run has another configuration ({'; '.join(changes)}); name another")


def stage_model(folder: Path, stage: int) -> Path:
    """The model after a stage; 0: before the first."""
    return folder / "stages" / str(stage)


def stage_checkpoints(folder: Path, stage: int) -> Path:
    return folder / "checkpoints" / f"stage_{stage}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Of one stage, oldest first."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def progress(checkpoint: Path, what: str) -> int:
    """`step` or `samples_seen` of a complete checkpoint."""
    return int(read_json(checkpoint / COMPLETE, dict)[what])


def stages_done(folder: Path, stages: int) -> int:
    """How many of a run's stages have written their model, from the first on; -1 if there is none to begin with."""
    if (folder / MODEL_CONFIG).is_file():
        return stages
    done = [int(path.name) for path in (folder / "stages").glob("[0-9]*") if (path / MODEL_CONFIG).is_file()]
    return max(done, default=-1)
