"""Contact sheets: images with their generated and true captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TEXT_PX = 14
LINE_PX = 18
MARGIN_PX = 12
RIGHT, WRONG, TRUE = (20, 120, 50), (170, 40, 30), (105, 105, 105)


@dataclass(frozen=True)
class Captioned:
    """An image, its generated caption, and the true one if it is known."""

    image: Image.Image
    generated: str
    true: str | None = None


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width_px:
            lines.append(line)
            line = word
        else:
            line = longer
        while font.getlength(line) > width_px and len(line) > 1:  # a word wider than the cell
            cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width_px)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line] if line else lines or ["(nothing)"]


def contact_sheet(cells: Sequence[Captioned], columns: int = 4, cell_px: int = 200) -> Image.Image:
    """A grid of images. Below each stands its generated caption: black without a true one, green if both are equal,
    else red with the true one below it in gray."""
    font = ImageFont.load_default(TEXT_PX)
    texts: list[list[tuple[str, tuple[int, int, int]]]] = []
    for cell in cells:
        same = cell.true is not None and "".join(cell.generated.split()) == "".join(cell.true.split())
        color = (0, 0, 0) if cell.true is None else RIGHT if same else WRONG
        lines = [(line, color) for line in _wrap(cell.generated, font, cell_px)]
        if cell.true is not None and not same:
            lines += [(line, TRUE) for line in _wrap(cell.true, font, cell_px)]
        texts.append(lines)
    rows = [list(range(start, min(start + columns, len(cells)))) for start in range(0, len(cells), columns)]
    heights = [cell_px + 6 + LINE_PX * max(len(texts[index]) for index in row) + MARGIN_PX for row in rows]
    width = MARGIN_PX + min(columns, max(len(cells), 1)) * (cell_px + MARGIN_PX)
    sheet = Image.new("RGB", (width, MARGIN_PX + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN_PX + column * (cell_px + MARGIN_PX)
            picture = cells[index].image.convert("RGB")
            scale = cell_px / max(picture.size)
            small = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
            )
            sheet.paste(small, (left + (cell_px - small.width) // 2, top + (cell_px - small.height) // 2))
            draw.rectangle((left - 1, top - 1, left + cell_px, top + cell_px), outline=(215, 215, 215))
            for line, (text, color) in enumerate(texts[index]):
                draw.text((left, top + cell_px + 6 + line * LINE_PX), text, fill=color, font=font)
        top += height
    return sheet
