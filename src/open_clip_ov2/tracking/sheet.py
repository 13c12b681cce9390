"""Contact sheets: images with their generated and true captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

TEXT_PX = 14
LINE_PX = 18
GAP_PX = 6  # between an image and its text
MARGIN_PX = 12
CELL_PX = 200
FAINT = 0.15  # what is left of a dropped patch
BLACK, GREEN, RED, GRAY = (0, 0, 0), (20, 120, 50), (170, 40, 30), (105, 105, 105)


@dataclass(frozen=True)
class Captioned:
    """An image, its generated caption, and the true one if it is known."""

    image: Image.Image
    generated: str
    true: str | None = None


def dropped_gray(pixels_HWC: npt.NDArray[np.uint8], kept: npt.NDArray[np.float32]) -> Image.Image:
    """The image with each patch as gray as the share of draws that dropped it. `kept` `(rows, columns)` in [0, 1]."""
    (height, width), (rows, columns) = pixels_HWC.shape[:2], kept.shape
    here_HW = kept[np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)]
    share_HW1 = FAINT + (1 - FAINT) * here_HW[..., None]
    return Image.fromarray(np.round(pixels_HWC * share_HW1 + np.array(GRAY) * (1 - share_HW1)).astype(np.uint8))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Lines of equally many characters at most, as many as fit."""
    for characters in range(width_px // 4, 0, -1):
        lines = textwrap.wrap(text, characters)
        if all(font.getlength(line) <= width_px for line in lines):
            break
    return lines or ["(nothing)"]


def contact_sheet(cells: Sequence[Captioned], columns: int = 8) -> Image.Image:
    """A grid of images. Below each stands its generated caption: black without a true one, green if both are equal,
    else red with the true one below it in gray."""
    drawn = [_cell(cell) for cell in cells]
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    heights = [max(cell.height for cell in row) + MARGIN_PX for row in rows]
    width = MARGIN_PX + min(columns, max(len(cells), 1)) * (CELL_PX + MARGIN_PX)
    sheet = Image.new("RGB", (width, MARGIN_PX + sum(heights)), "white")
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (MARGIN_PX + column * (CELL_PX + MARGIN_PX), top))
        top += height
    return sheet


def _cell(cell: Captioned) -> Image.Image:
    """The image, scaled to fit a square, and the lines of text below it."""
    font = ImageFont.load_default(TEXT_PX)
    right = cell.true is not None and "".join(cell.generated.split()) == "".join(cell.true.split())
    color = BLACK if cell.true is None else GREEN if right else RED
    lines = [(line, color) for line in _wrap(cell.generated, font, CELL_PX)]
    if cell.true is not None and not right:
        lines += [(line, GRAY) for line in _wrap(cell.true, font, CELL_PX)]
    drawn = Image.new("RGB", (CELL_PX, CELL_PX + GAP_PX + LINE_PX * len(lines)), "white")
    drawn.paste(ImageOps.pad(cell.image.convert("RGB"), (CELL_PX, CELL_PX), Image.Resampling.LANCZOS, color="white"))
    draw = ImageDraw.Draw(drawn)
    draw.rectangle((0, 0, CELL_PX - 1, CELL_PX - 1), outline=(215, 215, 215))
    for index, (line, color) in enumerate(lines):
        draw.text((0, CELL_PX + GAP_PX + index * LINE_PX), line, fill=color, font=font)
    return drawn
