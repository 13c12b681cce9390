"""The training crop and reduced decoding. Oracles: torchvision, PIL, and the exact path for the fast one."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from broken_shards import TXT, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision import transforms as T

from open_clip_ov2.data.crop import MARGIN, Box, RandomCrop
from open_clip_ov2.data.decode import EncodedImage, jpeg_size, reduction_for
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.skips import TOO_MANY_PIXELS, UNDECODABLE_IMAGE, SkipSample

AREA, RATIO = (0.4, 1.0), (3 / 4, 4 / 3)
JITTER = (0.32, 0.32, 0.32, 0.08)


def draw(width: int, height: int) -> Box:
    top, left, down, across = T.RandomResizedCrop.get_params(torch.empty(0, height, width), [*AREA], [*RATIO])
    return Box(left, top, across, down)


def crop_of(side: int = 84, **changed: Any) -> RandomCrop:
    return RandomCrop((side, side), draw, **changed)


def reduction_of(box: Box, side: int) -> int:
    """What `RandomCrop.decoded` reduces a JPEG by."""
    return reduction_for((box.height, box.width), (MARGIN * side, MARGIN * side))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **{"quality": 85, **options})
    return buffer.getvalue()


def scene(number: int, width: int = 512, height: int = 512) -> Image.Image:
    """Shapes on noise whose amplitude falls with frequency, as a photograph's does."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / width
    phases = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    noise = np.fft.irfft2(phases / frequency**1.2, s=(height, width))
    pixels = np.clip(128 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    for _ in range(6):
        x, y, radius = rng.integers(0, width), rng.integers(0, height), rng.integers(10, 100)
        fill = tuple(rng.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return image


def psnr(one: Tensor, other: Tensor) -> float:
    """Of uint8 pictures, dB."""
    error = (one.double() - other.double()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize("jitter", [(0.8, 0.2), (1.0, 0.0), (0.0, 1.0), None])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_whole_transform_is_torchvisions(
    jitter: tuple[float, float] | None, fast: bool, interpolation: str
) -> None:
    """Oracle: the same steps of torchvision on PIL: bit for bit, and within one level before jitter if fast."""
    steps: list[Any] = [T.RandomResizedCrop(40, AREA, RATIO, T.InterpolationMode(interpolation))]
    ours = None
    if jitter is not None:
        steps += [T.RandomApply([T.ColorJitter(*JITTER)], p=jitter[0])] if jitter[0] else []
        steps += [T.RandomGrayscale(jitter[1])] if jitter[1] else []
        ours = T.Compose(steps[1:])
    image, theirs = scene(3, 90, 70), T.Compose(steps)
    for seed in range(12):
        torch.manual_seed(seed)
        expected = torch.from_numpy(np.array(theirs(image))).permute(2, 0, 1)
        torch.manual_seed(seed)
        found = crop_of(40, jitter=ours, fast=fast, interpolation=interpolation)(image)
        assert found.dtype == torch.uint8
        if not fast:
            assert torch.equal(found, expected)
        elif ours is None:
            assert (found.int() - expected.int()).abs().max() <= 1
        else:  # the hue of a dark pixel turns far for one level
            assert psnr(found, expected) > 45


def test_fast_decoding_cuts_the_same_box_and_loses_little() -> None:
    """Oracle: the exact path for the same seed (a median near 40 dB); another box has less than half of that."""
    found, elsewhere, reduced = [], [], []
    for number in range(12):
        raw = {"txt": b"x", "jpg": jpeg(scene(number), quality=77)}
        exact, fast = (Decoder(crop_of(fast=fast), TXT) for fast in (False, True))
        found.append(psnr(fast.train(raw, number)[0], exact.train(raw, number)[0]))
        elsewhere.append(psnr(fast.train(raw, number)[0], exact.train(raw, number + 100)[0]))
        torch.manual_seed(number)
        reduced.append(reduction_of(draw(512, 512), 84))
    assert set(reduced) <= {1, 2}
    assert reduced.count(2) > 6
    assert np.median(found) < 60  # or nothing was reduced
    assert np.median(found) > 37
    assert min(found) > 30
    assert np.median(elsewhere) < 20


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 448))
def test_the_crop_keeps_the_margin(across: int, down: int, side: int) -> None:
    """Oracle: the inequality itself, and that the next reduction would break it."""
    chosen = reduction_of(Box(0, 0, across, down), side)
    assert chosen in (1, 2, 4, 8)
    if chosen > 1:
        assert min(across, down) / chosen >= MARGIN * side
    if chosen < 8:
        assert min(across, down) / (2 * chosen) < MARGIN * side
    assert reduction_for((10**6, 10**6), (1, 1)) == 8


@pytest.mark.parametrize("options", [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)])
@pytest.mark.parametrize("size", [(97, 61), (64, 64), (7, 33), (1, 1)])
def test_whole_jpegs_are_pils_bit_for_bit(options: dict[str, Any], size: tuple[int, int]) -> None:
    """Oracle: PIL."""
    for image in (scene(1, 128, 128).resize(size), scene(2, 128, 128).convert("L").resize(size)):
        data = jpeg(image, **options)
        encoded = EncodedImage(data, fast=True)
        assert encoded.size == jpeg_size(data) == size
        pixels = encoded.rgb_reduced(1)
        assert pixels is not None
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        for reduction in (2, 4, 8):
            pixels = encoded.rgb_reduced(reduction)
            assert pixels is not None
            assert pixels.shape == (-(-size[1] // reduction), -(-size[0] // reduction), 3)


def test_what_is_no_plain_jpeg_is_left_to_pil() -> None:
    """Oracle: the exact path's result or cause for the same bytes."""
    whole = jpeg(scene(5, 120, 120))
    cases = {
        "cmyk": jpeg(scene(4, 120, 120).convert("CMYK")),
        "png": picture(3, side=90),
        "text after it": whole + b"trailing",
        "cut": whole[:-400],
        "cut header": whole[:30],
        "jpeg by its first bytes alone": b"\xff\xd8\xff" + bytes(200),
    }
    exact, fast = (Decoder(crop_of(20, fast=fast), TXT) for fast in (False, True))
    for name, data in cases.items():
        raw = {"txt": b"x", "jpg": data}
        if not name.startswith(("cut", "jpeg")):
            assert psnr(fast.train(raw, 1)[0], exact.train(raw, 1)[0]) > 30, name
            continue
        for decoder in (exact, fast):
            with pytest.raises(SkipSample) as error:
                decoder.train(raw, 1)
            assert error.value.cause == UNDECODABLE_IMAGE, name
    with pytest.raises(SkipSample) as error:
        Decoder(crop_of(), TXT, 120 * 120 - 1).train({"txt": b"x", "jpg": whole}, 1)
    assert error.value.cause == TOO_MANY_PIXELS


def test_no_generator_of_others_is_touched() -> None:
    """Oracle: torch's state before and after; equal seeds give equal pictures, others do not."""
    decoder, raw = Decoder(crop_of(30), TXT), {"txt": b"x", "jpg": jpeg(scene(6, 200, 100))}
    before = torch.get_rng_state()
    pictures = [decoder.train(raw, seed)[0] for seed in [*range(10), 0]]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pictures[0], pictures[-1])
    assert len({one.numpy().tobytes() for one in pictures}) == 10
