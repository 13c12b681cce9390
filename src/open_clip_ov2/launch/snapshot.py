"""What a submission keeps, so that the job runs what was submitted: the package, the recipe, versions, git's state."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import open_clip_ov2
from open_clip_ov2.argv import value_of, without
from open_clip_ov2.launch.folder import Submission

PACKAGE = Path(open_clip_ov2.__file__).parent
_DIFF_LIMIT = 5_000_000  # characters, ours: a larger difference is somebody's data


def take(submission: Submission, command: Sequence[str]) -> None:
    shutil.copytree(PACKAGE, submission.code / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    texts = {"command.txt": shlex.join(command) + "\n", "versions.txt": _versions(), "git.txt": _git_state(PACKAGE)}
    for name, text in texts.items():
        if text:
            (submission.folder / name).write_text(text, encoding="utf-8")


def keep_recipe(submission: Submission, argv: Sequence[str]) -> tuple[str, ...]:
    """Copy the recipe, if there is one, into the submission's folder; `argv` with --recipe pointing to the copy."""
    recipe = value_of(argv, "--recipe")
    if recipe is None:
        return tuple(argv)
    copy = submission.folder / "recipe" / Path(recipe).name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(recipe, copy)
    return (*without(argv, ("--recipe",)), "--recipe", str(copy))


def _versions() -> str:
    names = sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()}, key=str.lower)
    return "\n".join([f"python=={platform.python_version()}", *names]) + "\n"


def _git_state(folder: Path) -> str:
    """Commit, status and uncommitted changes; empty outside a repository."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return commit and f"commit {commit}\n{git('status', '--short')}\n{git('diff', 'HEAD')[:_DIFF_LIMIT]}"
