"""The page as a browser lays it out. Oracle: headless Chromium's own measurements."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from open_clip_ov2.compare import page
from open_clip_ov2.compare.results import Found

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (bash scripts/setup_debian.sh installs one)")
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "index.html"
MEASURED = """<script>
const inside = (a, b) =>
  a.left >= b.left - 2 && a.right <= b.right + 2 && a.top >= b.top - 2 && a.bottom <= b.bottom + 2;
const plots = [...document.querySelectorAll("figure svg")], box = node => node.getBoundingClientRect();
const body = getComputedStyle(document.body);
document.title = JSON.stringify({
  width: innerWidth,
  content: document.documentElement.scrollWidth,
  plots: plots.map(plot => [box(plot).width, box(plot).height]),
  cut: plots.flatMap(plot => [...plot.querySelectorAll("text")]
    .filter(text => !inside(box(text), box(plot))).map(text => text.textContent)),
  ink: body.color,
  paper: body.backgroundColor,
  labels: [...new Set(plots.flatMap(plot => [...plot.querySelectorAll("text")].map(t => getComputedStyle(t).fill)))],
  fetched: performance.getEntriesByType("resource").length,
});
</script></body>"""


@pytest.fixture(scope="module", params=["the repository's", "made up"])
def text(request: pytest.FixtureRequest) -> str:
    if request.param == "the repository's":
        return RESULTS.read_text(encoding="utf-8")
    from made_up import made_up

    found: Found = made_up()
    return page.page("All", [found], "ov2 compare small.toml")


def laid_out(text: str, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    file = folder / "page.html"
    file.write_text(text.replace("</body>", MEASURED), encoding="utf-8")
    assert BROWSER is not None
    argv = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder}/profile",
        "--virtual-time-budget=2000", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    (title,) = re.findall(r"<title>(\{.*?\})</title>", done.stdout, flags=re.DOTALL)
    return json.loads(html.unescape(title))


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(text: str, tmp_path: Path, width: int) -> None:
    """A phone's and a desk's: nothing scrolls sideways but tables in their frames; no plot is a sliver."""
    found = laid_out(text, tmp_path, width)
    assert found["width"] == width
    assert found["content"] <= width
    assert len(found["plots"]) == text.count("<figure id=")
    assert all(wide > 250 and high > 60 for wide, high in found["plots"])
    assert found["cut"] == []
    assert found["fetched"] == 0


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's ratio of two colors `rgb(r, g, b)`."""
    levels = []
    for color in (one, other):
        channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
        red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        levels.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(levels) / min(levels)


def test_light_and_dark(text: str, tmp_path: Path) -> None:
    """Both can be read, labels of plots too, and they are not one."""
    light, dark = (laid_out(text, tmp_path, 1280, dark=dark) for dark in (False, True))
    assert light["paper"] != dark["paper"]
    for found in (light, dark):
        assert found["labels"] == [found["ink"]]
        assert contrast(found["ink"], found["paper"]) > 7  # WCAG's stricter level
