"""Pictures of text for training and for tests: words, letter strings, numbers and lines of two words in many fonts.

Words come from the `wonderwords` package, fonts from packages on PyPI, and more fonts from npm where a folder of them
is given (`scripts/fonts.py`). One word in ten, and whole font families, are held out.
"""

from __future__ import annotations

import importlib.util
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

RGB = tuple[int, int, int]
LONGEST_WORD = 10  # letters: at 64 px a longer word has less than 6 px for a letter
TRAINED_FONTS = {"matplotlib": "DejaVu*[!y].ttf", "font_roboto": "*.ttf", "font_lato": "*.ttf", "font_caladea": "*.ttf"}
HELD_OUT_FONTS = {"font_manrope": "*.ttf", "font_hanken_grotesk": "*.otf", "font_source_serif_pro": "*.otf"}
UNWANTED = ("thin", "extralight", "variable")


def package_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: the package {name} is missing: pip install 'open_clip_ov2[demo]'")
    return Path(spec.origin).parent


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """The lower-case words of wonderwords, of two to LONGEST_WORD letters, sorted."""
    folder = package_folder("wonderwords") / "assets"
    lines = [
        line.strip()
        for name in ("noun", "verb", "adjective")
        for line in (folder / f"{name}list.txt").read_text(encoding="utf-8").splitlines()
    ]
    usable = {line for line in lines if line.isascii() and line.isalpha() and line.islower()}
    return tuple(sorted(word for word in usable if 2 <= len(word) <= LONGEST_WORD))


def font_files(packages: Mapping[str, str], folder: Path | None = None) -> tuple[str, ...]:
    """The packages' fonts that match, and those of a folder made by `scripts/fonts.py`, sorted by name."""
    found = [path for name, pattern in packages.items() for path in package_folder(name).rglob(pattern)]
    if folder is not None:
        found += folder.rglob("*.ttf")
    readable = [path for path in found if not any(word in path.name.lower() for word in UNWANTED)]
    return tuple(str(path) for path in sorted(readable, key=lambda path: (path.name, str(path))))


@lru_cache(maxsize=4096)
def font_at(file: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    return ImageFont.truetype(file, size)


@dataclass(frozen=True)
class Text:
    """What a picture says: the caption, and what is drawn in one or two lines."""

    caption: str
    lines: tuple[str, ...]


def plan_text(kind: str, vocabulary: Sequence[str], rng: random.Random, longest: int = LONGEST_WORD) -> Text:
    """Text of a kind: words, letters, numbers, two words, or mixed case; `longest` bounds letters and numbers."""
    if kind == "numbers":
        digits = "".join(rng.choice(string.digits) for _ in range(rng.randint(1, min(6, longest))))
        return Text(f"the number {digits}", (digits,))
    if kind == "letters":
        letters = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, min(7, longest))))
        return Text(f"the word {letters}", (letters,))
    first = rng.choice(vocabulary)
    if kind == "two words":
        second = rng.choice(vocabulary)
        lines = (first, second) if len(first) + len(second) > 9 or rng.random() < 0.5 else (f"{first} {second}",)
        return Text(f"the words {first} {second}", lines)
    drawn = rng.choice((first.upper(), first.capitalize())) if kind == "mixed case" else first
    return Text(f"the word {first}", (drawn,))


def luminance(color: RGB) -> float:
    """Brightness from 0 to 255 (Rec. 601)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def choose_colors(rng: random.Random) -> tuple[RGB, RGB]:
    """Ink and paper: mostly dark on light, else light on dark or any two colors that differ by 90 in brightness."""
    draw = rng.random()
    if draw < 0.75:
        light, dark = rng.randint(225, 255), rng.randint(0, 70)
        paper: RGB = (light, light, light)
        ink: RGB = (dark, dark, dark)
        if rng.random() < 0.3:
            ink = (rng.randint(0, 200), rng.randint(0, 90), rng.randint(0, 200))
        return (ink, paper) if draw < 0.55 else (paper, ink)
    while True:
        one, other = ((rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)) for _ in range(2))
        if abs(luminance(one) - luminance(other)) > 90:
            return one, other


def fitting_font(lines: Sequence[str], file: str, side: int, rng: random.Random) -> ImageFont.FreeTypeFont:
    """The font at a size for which the text fills 70% to 97% of the width, or 43% to 76% of the height."""
    boxes = [font_at(file, 40).getbbox(line) for line in lines]
    width = max(box[2] - box[0] for box in boxes)
    height = 50 * len(lines)
    width_limit, height_limit = 0.97 * side / max(width, 1), 0.95 * side / height
    wanted = min(width_limit * rng.uniform(0.72, 1), height_limit * rng.uniform(0.45, 0.8))
    return font_at(file, round(40 * wanted))


def draw_lines(lines: Sequence[str], file: str, side: int, rng: random.Random) -> Image.Image:
    """The text as a mask (mode L, ink 255) at a random place, a fifth of them turned by up to 8 degrees."""
    mask = Image.new("L", (side, side), 0)
    pen, font = ImageDraw.Draw(mask), fitting_font(lines, file, side, rng)
    boxes = [font.getbbox(line) for line in lines]
    step = round(font.size * 1.15)
    height = step * (len(lines) - 1) + max(box[3] - box[1] for box in boxes)
    width = max(box[2] - box[0] for box in boxes)
    left, top = rng.uniform(0.01 * side, 0.99 * side - width), rng.uniform(0.02 * side, 0.98 * side - height)
    for number, (line, box) in enumerate(zip(lines, boxes, strict=True)):
        indent = (width - (box[2] - box[0])) / 2
        pen.text(
            (left + indent - box[0], top + number * step - min(box[1] for box in boxes)), line, font=font, fill=255
        )
    if rng.random() < 0.2:
        mask = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)
    return mask


def draw_text(text: Text, fonts: Sequence[str], side: int, rng: random.Random) -> Image.Image:
    """The picture (RGB, side x side): text on plain, shaded or framed paper; some are blurred, some have noise."""
    ink, paper = choose_colors(rng)
    mask = draw_lines(text.lines, rng.choice(fonts), side, rng)
    picture = Image.new("RGB", (side, side), paper)
    style = rng.random()
    if style < 0.12:  # a sign: the paper ends before the picture does
        margin = rng.randint(1, side // 10)
        picture.paste(ink if rng.random() < 0.5 else (128, 128, 128), (0, 0, side, side))
        left, top, right, bottom = mask.getbbox() or (0, 0, side, side)
        panel = (
            min(margin, left - 1),
            min(margin, top - 1),
            max(side - margin, right + 1),
            max(side - margin, bottom + 1),
        )
        ImageDraw.Draw(picture).rectangle(panel, fill=paper)
    picture.paste(ink, (0, 0), mask)
    if 0.12 <= style < 0.24:  # uneven light
        shade = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((side, side))
        shade = shade.point([round(255 - rng.uniform(0.99, 1) * 0.3 * value) for value in range(256)])
        picture = ImageChops.multiply(picture, Image.merge("RGB", (shade, shade, shade)))
    if rng.random() < 0.12:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8) * side / 96))
    if rng.random() < 0.12:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 12), (side, side, 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    return picture
