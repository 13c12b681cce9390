"""Encoded bytes to RGB pixels. Every reader decodes here: training, evaluation, captioning and `ov2 shards resize`.

simplejpeg binds libjpeg-turbo as PIL does and at full scale gives the same pixels bit for bit (a test checks this); it
skips PIL's own copies. At a reduced scale the inverse DCT leaves the high frequencies out.
Shapes: H and W pixels.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

from open_clip_ov2.data.skips import TOO_MANY_PIXELS, UNDECODABLE_IMAGE, SkipSample

MAX_IMAGE_PIXELS = 89_478_485  # where PIL starts to warn of a decompression bomb
JPEG_START = b"\xff\xd8\xff"  # SOI, and the first byte of the next marker (ITU-T T.81, annex B)
# Of libjpeg-turbo's eighths these have SIMD code: 4/8 was measured at 0.8 of the time of full scale, 5/8 at 1.4.
REDUCTIONS = (8, 4, 2)
ORIENTATION = 0x0112  # EXIF 2.3, tag 274: 1 is upright
# Decode at no less than this times the new size before the filter proper: PIL's documentation calls 3 "close to fair
# resampling, almost indistinguishable".
REDUCING_GAP = 3.0


def decode_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The whole image in RGB. Raises SkipSample."""
    return EncodedImage(data, max_image_pixels).rgb()


class EncodedImage:
    """An image whose header has been read and whose pixels have not; `width` and `height` as stored, in px.

    Transparency is dropped, not composited, as OpenCLIP does it. With `fast`, plain JPEGs bypass PIL. Everything raises
    SkipSample for an image with more than `max_image_pixels` or one that cannot be decoded.
    """

    def __init__(self, data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS, *, fast: bool = False) -> None:
        self._data, self._max_pixels = data, max_image_pixels
        self._pil: Image.Image | None = None
        size = jpeg_size(data) if fast else None
        self._plain_jpeg = size is not None and size[0] * size[1] <= max_image_pixels
        self.width, self.height = size if size is not None and self._plain_jpeg else self._opened().size

    @property
    def format(self) -> str:
        """PIL's name of the format."""
        return self._opened().format or ""

    def rgb(self) -> Image.Image:
        image = self._opened()
        with pil_errors_skip(self._max_pixels):
            return image.convert("RGB")

    def rgb_reduced(self, reduction: int) -> npt.NDArray[np.uint8] | None:
        """Uint8 `(ceil(H / reduction), ceil(W / reduction), 3)` of a plain JPEG; None where `rgb` must be used."""
        if not self._plain_jpeg:
            return None
        sides = {"min_height": -(-self.height // reduction), "min_width": -(-self.width // reduction)}
        try:
            pixels_HWC: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
                self._data, "RGB", fastdct=False, fastupsample=False, **(sides if reduction > 1 else {})
            )
        except ValueError:
            return None
        return pixels_HWC

    def shrunk(self, short_side: int) -> Image.Image | None:
        """The image upright, its short side reduced to `short_side` px, in mode L, RGB or RGBA.

        None if it is upright and small enough already.
        """
        image = self._opened()
        with pil_errors_skip(self._max_pixels):
            scale = short_side / min(image.size)
            if scale >= 1 and image.getexif().get(ORIENTATION, 1) == 1:
                image.load()  # find damage here rather than in training
                return None
            width, height = (max(1, round(side * scale)) for side in image.size)
            if scale < 1:
                image.draft(None, (round(width * REDUCING_GAP), round(height * REDUCING_GAP)))
            image = _resizable(image)
            if scale < 1:
                image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
            return ImageOps.exif_transpose(image)

    def _opened(self) -> Image.Image:
        """PIL's image, its pixels not yet read."""
        if self._pil is None:
            with pil_errors_skip(self._max_pixels):
                image = Image.open(io.BytesIO(self._data))
                width, height = image.size
                if width * height > self._max_pixels:
                    limit = f"{width} x {height}, at most {self._max_pixels} (--max-image-pixels)"
                    raise SkipSample(TOO_MANY_PIXELS, limit)
                self._pil = image
        return self._pil


def _resizable(image: Image.Image) -> Image.Image:
    """L, RGB, or RGBA where the image has transparency and its format can keep it."""
    if image.mode in ("L", "RGB"):
        return image
    transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    return image.convert("RGBA" if transparent and image.format in ("PNG", "WEBP") else "RGB")


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
    except Exception as error:  # PIL's plugins raise almost anything on a corrupt file
        raise SkipSample(UNDECODABLE_IMAGE, f"{type(error).__name__}: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG from its header, in px; None for CMYK, a broken header, or what is no JPEG."""
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
