"""JPEGs decoded straight into arrays, at a reduced scale where that is enough.

simplejpeg binds libjpeg-turbo as PIL does, and at full scale gives the same pixels bit for bit (a test holds it); it
skips PIL's own copies. At a reduced scale the inverse DCT leaves the high frequencies out.
Shapes: H and W pixels, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

START = b"\xff\xd8\xff"  # SOI, and the first byte of the next marker (ITU-T T.81, annex B)
# Of libjpeg-turbo's eighths these have SIMD code: 4/8 was measured at 0.8 of the time of full scale, 5/8 at 1.4.
REDUCTIONS = (8, 4, 2)


class Jpeg(NamedTuple):
    """An encoded picture whose header was read; `width` and `height` are those of the file, px."""

    data: bytes
    width: int
    height: int

    def decode(self, reduction: int = 1) -> npt.NDArray[np.uint8] | None:
        """RGB `(ceil(H / reduction), ceil(W / reduction), 3)`; None if anything is odd: then PIL is to judge."""
        least = (
            {}
            if reduction == 1
            else {"min_height": -(-self.height // reduction), "min_width": -(-self.width // reduction)}
        )
        try:
            image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
                self.data, "RGB", fastdct=False, fastupsample=False, **least
            )
        except ValueError:
            return None
        return image


def read_header(data: bytes) -> Jpeg | None:
    """None for what is no JPEG, or one in CMYK, or broken."""
    if not data.startswith(START):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colours in ("CMYK", "YCCK") else Jpeg(data, width, height)


def reduction_for(least: tuple[int, int], wanted: tuple[float, float]) -> int:
    """The greatest reduction that leaves both sides of `least` at no less than `wanted` (px); 1 if none does."""
    return next((r for r in REDUCTIONS if all(side / r >= want for side, want in zip(least, wanted, strict=True))), 1)
