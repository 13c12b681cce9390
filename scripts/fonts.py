"""Bring 72 open font families from npm, as TrueType files for `scripts/rendered_data.py --fonts`.

    python scripts/fonts.py FOLDER

Needs npm. FOLDER gets the Latin regular and bold faces, and LICENSES.txt with each family's version and license.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from sample_sets import npm_packages

VERSION = "5.3.0"  # of every family that names no other
FAMILIES = """
abel alegreya anton architects-daughter archivo arvo barlow bebas-neue bitter cabin cardo caveat comfortaa
cormorant-garamond courier-prime crimson-text domine dosis eb-garamond exo-2 fira-mono fira-sans hind
ibm-plex-sans ibm-plex-serif inconsolata indie-flower inter josefin-sans kalam karla lato libre-baskerville
lobster merriweather montserrat mulish noto-sans noto-serif nunito open-sans oswald overpass pacifico
patrick-hand permanent-marker playfair-display poppins pt-sans pt-serif quicksand raleway righteous roboto
rokkitt rubik russo-one share-tech-mono signika slabo-27px space-mono special-elite titillium-web ubuntu
varela-round vollkorn vt323 work-sans yanone-kaffeesatz zilla-slab
amaranth@5.2.8 source-code-pro@5.3.1
"""


def packages() -> list[str]:
    """The npm packages with their pinned versions, so that the same fonts come each time."""
    return [f"@fontsource/{name if '@' in name else f'{name}@{VERSION}'}" for name in FAMILIES.split()]


def convert(source: Path, out: Path) -> list[str]:
    """Unpack the WOFF files of one package into TrueType, which opens faster; returns the line for LICENSES.txt."""
    from fontTools.ttLib import TTFont

    about = json.loads((source / "package.json").read_text(encoding="utf-8"))
    for weight in (400, 700):
        for path in (source / "files").glob(f"*-latin-{weight}-normal.woff"):
            with TTFont(path, recalcTimestamp=False) as font:
                font.flavor = None
                font.save(out / f"{source.name}-{weight}-normal.ttf")
    return [f"{about['name']} {about['version']}: {about['license']}"]


def main() -> None:
    """Install the packages into a temporary folder and convert their fonts."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/fonts.py FOLDER")
    out = Path(sys.argv[1])
    if (out / "LICENSES.txt").exists():
        print(f"{out}: the fonts are there")
        return
    with tempfile.TemporaryDirectory() as scratch:
        families = sorted((npm_packages(packages(), Path(scratch), "fonts") / "@fontsource").iterdir())
        out.mkdir(parents=True, exist_ok=True)
        licenses = [line for family in families for line in convert(family, out)]
    (out / "LICENSES.txt").write_text("\n".join(licenses) + "\n", encoding="utf-8")
    print(f"{out}: {len(list(out.glob('*.ttf')))} fonts of {len(licenses)} families")


if __name__ == "__main__":
    main()
