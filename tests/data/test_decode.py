"""One way to turn bytes into pixels. Oracle: the array that each picture was made from, turned and composited."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.crop import Box, RandomCrop
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS, decode_image
from open_clip_ov2.data.resize import Shrink, shrunk_image
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.skips import TOO_MANY_PIXELS, UNDECODABLE_IMAGE, SkipCounter, SkipSample
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.options import CaptionOptions
from open_clip_ov2.evaluate.pictures import Picture, captions_of

Pixels = npt.NDArray[Any]
WIDTH, HEIGHT = 24, 16
TXT = parse_caption_keys("txt")
# Where an upright image's rows and columns begin in the stored one, by numpy (EXIF 2.3, table 2).
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
FORMATS = {
    "PNG": ("L", "LA", "P", "P tRNS", "RGB", "RGBA", "I;16", "1"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "1"),
    "GIF": ("L", "P", "P tRNS", "1"),
}
SAVED = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
CASES = [(fmt, mode) for fmt, modes in FORMATS.items() for mode in modes]


def smooth() -> Pixels:
    """Colors without edges, which even a JPEG keeps; no two corners are alike."""
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([8 * across, 12 * down, 90 + 2 * across + 3 * down], axis=-1).astype(np.uint8)


def stored(mode: str) -> tuple[Image.Image, Pixels, dict[str, Any]]:
    """An image of a mode, its pixels in RGB over white, and options of `save`."""
    rgb = smooth()
    gray = rgb[..., 2]
    alpha = np.where(np.arange(WIDTH) < WIDTH // 2, 255, 0).astype(np.uint8) * np.ones((HEIGHT, 1), np.uint8)
    over = np.where(alpha[..., None] > 0, rgb, 255)
    gray_over = np.where(alpha > 0, gray, 255)[..., None].repeat(3, -1)
    if mode == "I;16":
        return Image.fromarray(gray.astype(np.uint16) << 8 | 200), gray[..., None].repeat(3, -1), {}
    if mode in ("LA", "RGBA"):
        color = Image.fromarray(gray if mode == "LA" else rgb)
        color.putalpha(Image.fromarray(alpha))
        return color, gray_over if mode == "LA" else over, {}
    if mode.startswith("P"):
        image = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        seen = np.asarray(image.convert("RGB"))
        if mode == "P":
            return image, seen, {}
        first = int(np.asarray(image)[0, 0])
        return image, np.where(np.asarray(image)[..., None] == first, 255, seen), {"transparency": first}
    if mode == "1":
        black = (gray > 120).astype(np.uint8) * 255
        return Image.fromarray(black).convert("1"), black[..., None].repeat(3, -1), {}
    image = Image.fromarray(rgb).convert(mode)
    return image, np.asarray(image.convert("RGB")), {}


def with_orientation(image: Image.Image, fmt: str, orientation: int, options: dict[str, Any]) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, fmt, **({} if fmt == "GIF" else {"exif": exif}), **SAVED.get(fmt, {}), **options)
    return buffer.getvalue()


def whole_picture(width: int, height: int, fast: bool) -> RandomCrop:
    """The training crop that takes all of a picture as it is."""
    return RandomCrop((height, width), lambda across, down: Box(0, 0, across, down), fast=fast)


def shrink_to(short_side: int) -> Shrink:
    return Shrink(short_side, quality=100, max_image_pixels=MAX_IMAGE_PIXELS)


def as_tensor(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def readings(data: bytes, width: int, height: int) -> dict[str, Tensor]:
    """What each reader makes of the same bytes."""
    raw = {"txt": b"x", "img": b"", "jpg": data}
    crops = {"training, fast": True, "training, exact": False}
    found = {name: Decoder(whole_picture(width, height, fast), TXT).train(raw, 1)[0] for name, fast in crops.items()}
    found["validation"] = Decoder(as_tensor, TXT).evaluate(raw)[0]
    found["captioning"] = as_tensor(decode_image(data))
    return found


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("fmt", "mode"), CASES)
def test_every_reader_sees_the_same_upright_picture(fmt: str, mode: str, orientation: int) -> None:
    image, pixels, options = stored(mode)
    data = with_orientation(image, fmt, orientation, options)
    expected = torch.from_numpy(UPRIGHT[1 if fmt == "GIF" else orientation](pixels).copy()).permute(2, 0, 1).int()
    height, width = expected.shape[1:]
    allowed = 3 if fmt == "JPEG" else 1 if mode == "CMYK" else 0
    resized = shrunk_image(data, shrink_to(10_000))
    for name, seen in readings(data, width, height).items():
        assert seen.shape == expected.shape, name
        assert (seen.int() - expected).abs().max() <= allowed, name
    for name, seen in readings(resized, width, height).items():
        assert seen.shape == expected.shape, f"{name} after resize"
        off = (seen.int() - expected).abs()
        if resized == data or fmt == "PNG":
            assert off.max() <= allowed, f"{name} after resize"
        else:  # written again as JPEG or lossy WebP; a picture that is turned or inverted is off by 40 and more
            assert off.float().mean() <= 5, f"{name} after resize"


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_reduced_picture_is_upright_and_so_is_its_resized_copy(orientation: int) -> None:
    """Large enough for the fast path to decode at 1/4. Oracle: the same picture stored upright."""
    large = Image.fromarray(smooth()).resize((16 * WIDTH, 16 * HEIGHT), Image.Resampling.BICUBIC)
    upright = Image.fromarray(UPRIGHT[orientation](np.asarray(large)).copy())
    raw, plain = (
        {"txt": b"x", "jpg": with_orientation(image, "JPEG", turn, {})}
        for image, turn in ((large, orientation), (upright, 1))
    )
    for fast in (True, False):
        decoder = Decoder(RandomCrop((12, 12), lambda across, down: Box(9, 21, across - 40, down - 30), fast=fast), TXT)
        seen, expected = (decoder.train(one, 5)[0].int() for one in (raw, plain))
        assert (seen - expected).abs().max() <= 3
    small, small_plain = (decode_image(shrunk_image(one["jpg"], shrink_to(20))) for one in (raw, plain))
    assert small.size == small_plain.size
    assert np.abs(np.asarray(small, dtype=int) - np.asarray(small_plain, dtype=int)).mean() <= 2  # two JPEGs


def test_transparent_pixels_are_white_before_and_after_resize() -> None:
    """Whatever color stands under them, in a picture that is shrunk."""
    for under in ((0, 0, 0, 0), (255, 255, 255, 0), (200, 10, 10, 0)):
        buffer = io.BytesIO()
        Image.new("RGBA", (64, 64), under).save(buffer, "PNG")
        for data in (buffer.getvalue(), shrunk_image(buffer.getvalue(), shrink_to(32))):
            assert np.asarray(decode_image(data)).min() == 255


def test_a_damaged_exif_block_costs_no_picture() -> None:
    """Oracle: the same JPEG without the block."""
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "JPEG", quality=100, exif=b"Exif\x00\x00no TIFF at all")
    plain = io.BytesIO()
    Image.fromarray(smooth()).save(plain, "JPEG", quality=100)
    assert b"no TIFF" in buffer.getvalue()
    expected = as_tensor(decode_image(plain.getvalue()))
    for name, seen in readings(buffer.getvalue(), WIDTH, HEIGHT).items():
        assert torch.equal(seen, expected) or (seen.int() - expected.int()).abs().max() <= 1, name
    assert decode_image(shrunk_image(buffer.getvalue(), shrink_to(8))).size == (12, 8)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_are_skipped_by_every_reader(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)).convert(mode).save(
        buffer, "TIFF"
    )
    for read in (
        decode_image,
        lambda data: shrunk_image(data, shrink_to(8)),
        lambda data: readings(data, WIDTH, HEIGHT),
    ):
        with pytest.raises(SkipSample, match="32-bit") as error:
            read(buffer.getvalue())
        assert error.value.cause == UNDECODABLE_IMAGE


def test_a_resize_that_would_exceed_the_pixel_limit_is_a_counted_skip() -> None:
    """The center is cut after the resize, which a thin line makes huge. Oracle: the transform's own sizes."""
    for size, pixels in (((8_000, 1), 224 * 8_000 * 224), ((1, 900), 224 * 900 * 224), ((300, 200), 224 * 336)):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        resized = Resize(224)(Image.new("RGB", (300, 200))).size if size == (300, 200) else None
        assert resized is None or resized[0] * resized[1] == pixels
        transform = Compose([Resize(224), CenterCrop(224), ToTensor()])
        raw = {"txt": b"x", "png": buffer.getvalue()}
        if resized is not None:
            assert Decoder(transform, TXT, pixels).evaluate(raw)[0].shape == (3, 224, 224)
        with pytest.raises(SkipSample, match="resized") as error:
            Decoder(transform, TXT, pixels - 1).evaluate(raw)
        assert error.value.cause == TOO_MANY_PIXELS


def test_captioning_skips_such_an_image_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """Before the transform has made it. Oracle: the size by hand."""
    thin = Picture("line.png", Image.new("RGB", (8_000, 1)))

    class Captioner:
        name, abilities = "a captioner", frozenset({"caption"})
        preprocess = Compose([Resize(224), CenterCrop(224), ToTensor()])

    skips = SkipCounter()
    assert list(captions_of(cast(EvalModel, Captioner()), [thin], CaptionOptions(), skips)) == []
    assert skips.total == {TOO_MANY_PIXELS: 1}
    assert "line.png: too many pixels (8000 x 1 px would be resized to 1792000 x 224" in caplog.text
