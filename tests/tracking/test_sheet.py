"""Contact sheets. Oracle: pixels, read back by numpy."""

from __future__ import annotations

import numpy as np
from PIL import Image

from open_clip_ov2.tracking.sheet import BLACK, GRAY, GREEN, MARGIN_PX, RED, Captioned, contact_sheet


def has(sheet: Image.Image, column: int, color: tuple[int, int, int]) -> bool:
    """Whether a column of cells (200 px wide) has pixels of the color below its image."""
    left = MARGIN_PX + column * (200 + MARGIN_PX)
    text = np.asarray(sheet)[MARGIN_PX + 200 :, left : left + 200]
    return bool((text == color).all(-1).any())


def test_colors_say_whether_a_caption_is_right() -> None:
    blue = Image.new("RGB", (50, 25), "blue")
    sheet = contact_sheet([
        Captioned(blue, "a dog"), Captioned(blue, "a dog", "a  dog"), Captioned(blue, "a dog", "a cat"),
    ])  # fmt: skip
    seen = [[color for color in (BLACK, GREEN, RED) if has(sheet, column, color)] for column in range(3)]
    assert seen == [[BLACK], [GREEN], [RED]]
    assert [has(sheet, column, GRAY) for column in (1, 2)] == [False, True]
    assert sheet.width == MARGIN_PX + 3 * (200 + MARGIN_PX)
    picture = np.asarray(sheet)[MARGIN_PX : MARGIN_PX + 200, MARGIN_PX : MARGIN_PX + 200]
    rows = (picture == (0, 0, 255)).all(-1).any(1).nonzero()[0]
    assert (rows.min(), rows.max()) == (50, 149)  # twice as wide as high: half of the cell, in its middle


def test_rows_and_long_words() -> None:
    """A word wider than its cell is cut, and a sheet has as many rows as it needs."""
    one = contact_sheet([Captioned(Image.new("RGB", (8, 8)), "x")] * 4, columns=4)
    two = contact_sheet([Captioned(Image.new("RGB", (8, 8)), "x")] * 5, columns=4)
    assert two.height > one.height + 200
    long = contact_sheet([Captioned(Image.new("RGB", (8, 8)), "w" * 60)])
    ink = (np.asarray(long)[MARGIN_PX + 200 :] != 255).any((0, 2)).nonzero()[0]
    assert ink.max() < MARGIN_PX + 200
    assert long.height > one.height
