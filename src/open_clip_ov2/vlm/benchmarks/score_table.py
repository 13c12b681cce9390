"""Scores kept beside a model, and the papers' table: rows encoders, columns benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.tables import read_toml

FOLDER, SUFFIX = "eval", "-scores.json"
COLUMNS = {
    "textvqa": "TextVQA", "chartqa": "ChartQA", "ocrbench": "OCRBench", "docvqa": "DocVQA", "mme_perception": "MME P",
    "mme_cognition": "MME C", "seed": "SEED", "seed_all": "SEED all", "sqa": "SQA", "gqa": "GQA", "pope": "POPE",
    "pope_f1": "POPE F1",
}  # fmt: skip
# Rules of question files that are a benchmark's own, with what makes a mean the papers' unit.
RULES = {
    "vqa": ("textvqa", 100), "relaxed": ("chartqa", 100), "ocrbench": ("ocrbench", 1000), "anls": ("docvqa", 100),
}  # fmt: skip


class Row(NamedTuple):
    """`recipe` and `source` say under what and by whom; `scores` by the names of COLUMNS, or by a question file's."""

    encoder: str
    recipe: str
    source: str
    scores: Mapping[str, float]


def write_scores(folder: Path, name: str, scores: Mapping[str, float], about: Mapping[str, Any]) -> Path:
    """Keep them in the model's folder under a name. Raises OSError."""
    path = folder / FOLDER / f"{name}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"scores": dict(scores), **about})
    return path


def scores_of_questions(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    """Of the result of `answer_questions`: a benchmark's under its name, others under the file's."""
    scores = {}
    for rule, row in found["by_rule"].items():
        column, factor = RULES.get(rule, (name, 100))
        scores[column] = factor * row["score"]
    return scores


def own_rows(folder: Path) -> list[Row]:
    """One for each source of scores in a model's folder, and one of its own for a trial with few questions (`limit`).
    Raises UserError if it has none."""
    files = sorted((folder / FOLDER).glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"{folder}: no scores; `ov2 vlm eval {folder} ...` makes them")
    about: Mapping[str, Any] = read_json(folder / "run.json", dict) if (folder / "run.json").is_file() else {}
    config = about.get("config", {})
    recipe = str(about.get("recipe") or config.get("kind", ""))  # runs of before have no name of theirs
    encoder = f"{folder.name} ({config['encoder']})" if config.get("encoder") else folder.name
    rows: dict[str, dict[str, float]] = {}
    for file in files:
        content = read_json(file, dict)
        source, scores = str(content.get("source", "?")), content.get("scores", {})
        if content.get("limit") is not None:
            source += f", first {content['limit']} questions"
        rows.setdefault(source, {}).update({key: float(value) for key, value in scores.items()})
    return [Row(encoder, recipe, source, scores) for source, scores in rows.items()]


def published_rows() -> list[Row]:
    content = read_toml(Path(__file__).with_name("published.toml"))
    return [Row(row["encoder"], row["recipe"], content["source"], row["scores"]) for row in content["row"]]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Its cells, headings first; a benchmark that no row has is left out."""
    given = {name for row in rows for name in row.scores}
    columns = [name for name in COLUMNS if name in given] + sorted(given - set(COLUMNS))
    head = ["encoder", "recipe", *(COLUMNS.get(name, name) for name in columns), "source"]
    return [head, *([row.encoder, row.recipe, *(_cell(name, row) for name in columns), row.source] for row in rows)]


def _cell(name: str, row: Row) -> str:
    if name not in row.scores:
        return ""
    return f"{row.scores[name]:.0f}" if name.startswith(("mme", "ocrbench")) else f"{row.scores[name]:.1f}"
