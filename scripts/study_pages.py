"""Put the answers of a study into README.md and docs/study.md: `python scripts/study_pages.py ANSWERS.md`.

Both get them between the lines `<!-- answers -->` and `<!-- end of answers -->`: docs/study.md those of all
comparisons, README.md those of the first one.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- answers -->", "<!-- end of answers -->"


def with_answers(text: str, made: str, answers: str) -> str:
    """The text with these answers between its marks. Raises ValueError if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n\n{answers.strip()}\n{END}{after}"


def first_of(answers: str) -> str:
    """The first comparison's, without its title."""
    return answers.split("### ")[1].partition("\n")[2]


def main(answers: Path, root: Path = ROOT) -> None:
    """Write both pages."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    scale = f"SCALE={os.environ['SCALE']} " if os.environ.get("SCALE") else ""
    command = f"`{scale}bash scripts/study.sh`, at commit `{commit or 'unknown'}`"
    made = f"Made on {datetime.date.today().isoformat()} by {command}:"
    text = answers.read_text(encoding="utf-8")
    for page, shown in ((root / "README.md", first_of(text)), (root / "docs" / "study.md", text)):
        page.write_text(with_answers(page.read_text(encoding="utf-8"), made, shown), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
