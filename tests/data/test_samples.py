"""One sample: decoding, its limits, and its own randomness."""

from __future__ import annotations

import io
import random
import warnings

import numpy as np
import pytest
import torch
from broken_shards import TXT, giant_png, picture, random_crop, to_tensor
from PIL import Image

from open_clip_ov2.data.decode import decode_image
from open_clip_ov2.data.samples import Decoder, ImageFile, encoded_image, sample_seed, seeded
from open_clip_ov2.data.skips import MISSING_IMAGE, TOO_MANY_PIXELS, TRANSFORM_FAILED, UNDECODABLE_IMAGE, SkipSample


@pytest.mark.parametrize("fmt", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "LA"])
def test_every_mode_becomes_rgb(fmt: str, mode: str) -> None:
    """Oracle: PIL's own conversion of the picture that was saved, over white where it is transparent."""
    image = Image.open(io.BytesIO(picture(1))).convert(mode)
    if fmt != "png":
        image = image.convert("RGB" if mode == "P" else "RGBA" if "A" in mode and fmt == "webp" else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, fmt, **({"lossless": True} if fmt == "webp" else {}))
    decoded = decode_image(buffer.getvalue())
    assert decoded.mode == "RGB"
    rgba = Image.open(io.BytesIO(buffer.getvalue())).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


@pytest.mark.parametrize("data", [b"", b"nonsense", picture(0)[:-40], picture(0, "jpeg")[:-200], picture()[:20]])
def test_undecodable(data: bytes) -> None:
    """Oracle: the cause."""
    with pytest.raises(SkipSample) as error:
        decode_image(data)
    assert error.value.cause == UNDECODABLE_IMAGE


def test_pixel_limit_comes_before_the_pixels_and_may_be_raised() -> None:
    """Oracle: width times height; the rows of a cut file are never looked at, so it is not undecodable."""
    cut = giant_png(20_000, 20_000)[:200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (89_478_485, 400_000_000 - 1):  # PIL's bomb error, and ours
            with pytest.raises(SkipSample) as error:
                decode_image(cut, limit)
            assert error.value.cause == TOO_MANY_PIXELS
    with pytest.raises(SkipSample) as error:
        decode_image(cut, 400_000_000)
    assert error.value.cause == UNDECODABLE_IMAGE
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert decode_image(picture(), 144).size == (12, 12)
    with pytest.raises(SkipSample):
        decode_image(picture(), 143)


def test_encoded_image_and_missing_files() -> None:
    """Oracle: the bytes put in; suffixes in any case."""
    assert encoded_image({"__key__": "k", "JPG": b"x", "txt": b"y"}) == b"x"
    assert encoded_image({"webp": b"x"}) == b"x"
    decoder = Decoder(to_tensor, TXT)
    missing = ImageFile(("/nowhere/a.png", "nul\0.png", "x" * 5000, "/"))
    for raw in ({"txt": b"x"}, {"txt": b"x", "__image__": missing}):
        with pytest.raises(SkipSample) as error:
            decoder.evaluate(raw)
        assert error.value.cause == MISSING_IMAGE
    assert "/nowhere/a.png" in error.value.detail


def test_transform_failure_is_a_skip() -> None:
    """Oracle: the cause, and the exception's name in the detail."""
    with pytest.raises(SkipSample) as error:
        Decoder(lambda image: 1 / 0, TXT).train({"txt": b"x", "png": picture()}, 0)
    assert error.value.cause == TRANSFORM_FAILED
    assert "ZeroDivisionError" in error.value.detail


def test_randomness_is_the_samples_own() -> None:
    """Oracle: equal seeds give equal crops, others do not, and no global generator moves."""
    decoder = Decoder(random_crop, TXT)
    raw = {"txt": b"x", "png": picture(2)}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    crops = [decoder.train(raw, seed)[0] for seed in [*range(20), 0]]
    assert torch.equal(crops[0], crops[-1])
    assert len({crop.numpy().tobytes() for crop in crops}) > 10
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    with pytest.raises(KeyError), seeded(1):
        {}[torch.rand(3)]
    assert torch.equal(torch.get_rng_state(), states[0])


def test_sample_seeds_differ_in_every_part() -> None:
    """Oracle: as many seeds as combinations."""
    parts = [(s, e, p, k) for s in range(4) for e in range(6) for p in range(3) for k in ("a", "b", "ab")]
    assert len({sample_seed(*part) for part in parts}) == len(parts)
