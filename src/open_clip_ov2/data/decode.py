"""Encoded bytes to upright RGB pixels, by the rules of docs/data.md ("Pixels"). Every reader decodes here: training,
evaluation, captioning and shards resize.

simplejpeg binds libjpeg-turbo as PIL does and at full scale gives the same pixels bit for bit (a test checks this); it
skips PIL's own copies. At a reduced scale the inverse DCT leaves the high frequencies out.
Shapes: H and W pixels.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from open_clip_ov2.data.skips import ODD_SHAPE, TOO_MANY_PIXELS, UNDECODABLE_IMAGE, SkipSample

MAX_IMAGE_PIXELS = 89_478_485  # where PIL starts to warn of a decompression bomb
LONGEST_SIDE, MOST_STRETCHED = 16_384, 100  # ours: padded to a square in 8 bits, the longest takes 0.8 GB
JPEG_START = b"\xff\xd8\xff"  # SOI, and the first byte of the next marker (ITU-T T.81, annex B)
# Of libjpeg-turbo's eighths these have SIMD code: 4/8 was measured at 0.8 of the time of full scale, 5/8 at 1.4.
REDUCTIONS = (8, 4, 2)
ORIENTATION = 0x0112  # EXIF 2.3, tag 274: 1 is upright
TURNS = {  # what makes an image of each other orientation upright (EXIF 2.3, table 2)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A JPEG without these bytes has no orientation: PIL reads it from EXIF, or from XMP where EXIF has none.
ORIENTATION_MARKS = (b"Exif\x00\x00", b"tiff:Orientation")
# Decode at no less than this times the new size before the filter proper: PIL's documentation calls 3 "close to fair
# resampling, almost indistinguishable".
REDUCING_GAP = 3.0


def bounded(image: Image.Image) -> Image.Image:
    """The image, for image processors of other libraries, which pad it to a square or resize its shorter side and would
    make gigabytes of a line of a few pixels. Raises SkipSample for such a line."""
    longer, shorter = max(image.size), min(image.size)
    if longer > LONGEST_SIDE or longer > MOST_STRETCHED * shorter:
        limits = f"more than {LONGEST_SIDE:,} px long, or {MOST_STRETCHED} times as long as wide"
        raise SkipSample(ODD_SHAPE, f"{image.width} x {image.height} px: {limits}")
    return image


def decode_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The whole image in RGB. Raises SkipSample."""
    return EncodedImage(data, max_image_pixels).rgb()


class EncodedImage:
    """An image whose header has been read and whose pixels have not. With `fast`, plain JPEGs bypass PIL.

    Everything raises SkipSample for an image with more than `max_image_pixels` or one that cannot be decoded.
    """

    def __init__(self, data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS, *, fast: bool = False) -> None:
        self._data, self._max_pixels = data, max_image_pixels
        size = jpeg_size(data) if fast else None
        self._jpeg_size = size if size is not None and size[0] * size[1] <= max_image_pixels else None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image, in px."""
        if self._jpeg_size is None:
            return self._upright.size
        return self._jpeg_size[::-1] if self._jpeg_orientation >= 5 else self._jpeg_size

    @property
    def format(self) -> str:
        """PIL's name of the format."""
        return self._opened.format or ""

    def rgb(self) -> Image.Image:
        """The whole upright image in RGB."""
        return self._upright.convert("RGB")

    def rgb_reduced(self, reduction: int) -> npt.NDArray[np.uint8] | None:
        """The upright image at 1 / `reduction` of its size, each side rounded up, uint8 `(H, W, 3)`, if it is a plain
        JPEG; None where `rgb` must be used."""
        if self._jpeg_size is None:
            return None
        width, height = self._jpeg_size
        sides = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        try:
            pixels_HWC: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
                self._data, "RGB", fastdct=False, fastupsample=False, **(sides if reduction > 1 else {})
            )
        except ValueError:
            return None
        turn = TURNS.get(self._jpeg_orientation)
        return pixels_HWC if turn is None else np.array(Image.fromarray(pixels_HWC).transpose(turn))

    def shrunk(self, short_side: int) -> Image.Image | None:
        """The image upright, its short side reduced to `short_side` px, in mode L or RGB.

        None if it is upright and small enough already.
        """
        with pil_errors_skip(self._max_pixels):
            stored, scale = self._opened.size, short_side / min(self._opened.size)
            if scale < 1:
                width, height = (round(side * scale * REDUCING_GAP) for side in stored)
                self._opened.draft(None, (width, height))
        image = self._upright
        if scale >= 1:
            return None if orientation_of(self._opened) == 1 else image
        width, height = (max(1, round(side * scale)) for side in stored)
        if (image.width > image.height) != (width > height):
            width, height = height, width
        return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)

    @cached_property
    def _upright(self) -> Image.Image:
        """The upright image in mode L or RGB."""
        image = self._opened
        with pil_errors_skip(self._max_pixels):
            image.load()
            turn = TURNS.get(orientation_of(image))  # now: PIL turns a TIFF by itself as it loads
            opaque = _opaque(image)
            return opaque if turn is None else opaque.transpose(turn)

    @cached_property
    def _jpeg_orientation(self) -> int:
        """Of a plain JPEG, from 1 to 8."""
        if not any(mark in self._data for mark in ORIENTATION_MARKS):
            return 1
        return orientation_of(self._opened)

    @cached_property
    def _opened(self) -> Image.Image:
        """PIL's image, its pixels not yet read."""
        with pil_errors_skip(self._max_pixels):
            image = Image.open(io.BytesIO(self._data))
            width, height = image.size
            if width * height > self._max_pixels:
                limit = f"{width} x {height}, at most {self._max_pixels} (--max-image-pixels)"
                raise SkipSample(TOO_MANY_PIXELS, limit)
            return image


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, from 1 to 8; 1 if there is none, or if the EXIF block is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises almost anything on a block that is not TIFF; only the pixels are needed
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _opaque(image: Image.Image) -> Image.Image:
    """In mode L or RGB. Raises SkipSample for values without a defined range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise SkipSample(UNDECODABLE_IMAGE, f"mode {image.mode}: 32-bit values without a defined range of brightness")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


@contextlib.contextmanager
def pil_errors_skip(max_image_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[None]:
    """What PIL raises becomes SkipSample. PIL's own pixel limit (an error at twice this) is set to ours meanwhile.

    Warnings are off, since skips are counted; all of them, because leaving catch_warnings forgets which were shown, so
    that each odd file would print its own again.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_image_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SkipSample:
        raise
    except Image.DecompressionBombError as error:
        raise SkipSample(TOO_MANY_PIXELS, str(error)) from None
    except UnidentifiedImageError:  # its own text shows an address in memory
        raise SkipSample(UNDECODABLE_IMAGE, "not in an image format that PIL reads") from None
    except Exception as error:  # PIL's plugins raise almost anything on a corrupt file
        raise SkipSample(UNDECODABLE_IMAGE, f"{type(error).__name__}: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG from its header, in px; None for CMYK, a broken header, or another format."""
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colors in ("CMYK", "YCCK") else (width, height)


def reduction_for(sides: tuple[int, int], wanted: tuple[float, float]) -> int:
    """The greatest reduction that leaves both `sides` at no less than `wanted` (px); 1 if none does."""
    return next((r for r in REDUCTIONS if all(side / r >= want for side, want in zip(sides, wanted, strict=True))), 1)
