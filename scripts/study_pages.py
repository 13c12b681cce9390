"""Put the answers of a study into README.md and docs/study.md: `python scripts/study_pages.py docs/results/answers.md`.

Both get them between the lines `<!-- answers -->` and `<!-- end of answers -->`; the README without what comes after
the first `##` of docs/study.md.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- answers -->", "<!-- end of answers -->"
STUDY = f"""# Study: how to train a vision encoder

[results/index.html](results/index.html) is the page (answers, charts, tables, curves),
[results.md](results/results.md) the tables alone, [results.csv](results/results.csv) every number of every seed. Made
by `bash scripts/study.sh`.

## Answers
{BEGIN}
{END}
"""


def with_answers(text: str, answers: str, made: str) -> str:
    """The text with these answers between its marks. Raises ValueError if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n\n{answers.strip()}\n{END}{after}"


def main(answers: Path) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    made = f"Made on {datetime.date.today().isoformat()} by `bash scripts/study.sh`, at commit `{commit or 'unknown'}`:"
    text = answers.read_text(encoding="utf-8")
    readme, study = ROOT / "README.md", ROOT / "docs" / "study.md"
    readme.write_text(with_answers(readme.read_text(encoding="utf-8"), text, made), encoding="utf-8")
    study.write_text(with_answers(STUDY, text, made), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
