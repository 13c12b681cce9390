"""A submission keeps what it needs: the package, the recipe; and says what it cannot keep: packages, git's state."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import open_clip_ov2
from open_clip_ov2.launch.folder import Submission

PACKAGE = Path(open_clip_ov2.__file__).parent
_DIFF_LIMIT = 5_000_000  # characters; ours: a larger difference is somebody's data


def take(submission: Submission, command: Sequence[str]) -> None:
    folder = submission.folder
    shutil.copytree(PACKAGE, submission.code / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    (folder / "versions.txt").write_text(_versions(), encoding="utf-8")
    state = _git_state(PACKAGE)
    if state:
        (folder / "git.txt").write_text(state, encoding="utf-8")


def keep_recipe(submission: Submission, recipe: Path, argv: Sequence[str]) -> tuple[str, ...]:
    """`argv` with --recipe pointing at a copy in the submission's folder."""
    copy = submission.folder / "recipe" / recipe.name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(recipe, copy)
    out: list[str] = []
    for word in argv:
        if out and out[-1] == "--recipe":
            out.append(str(copy))
        elif word.startswith("--recipe="):
            out.append(f"--recipe={copy}")
        else:
            out.append(word)
    return tuple(out)


def _versions() -> str:
    names = sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()}, key=str.lower)
    return "\n".join([f"python=={platform.python_version()}", *names]) + "\n"


def _git_state(folder: Path) -> str:
    """Commit, status and difference, or nothing outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    status, diff = _git(folder, "status", "--short"), _git(folder, "diff", "HEAD")
    return f"commit {commit}\n{status}\n{diff[:_DIFF_LIMIT]}"


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
