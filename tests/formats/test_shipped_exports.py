"""The model in the package, in every format that `ov2 export` knows.

Oracle: each format's own library, whose patch tokens equal those of the model that was exported, on pictures of noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from open_clip_ov2 import training
from open_clip_ov2.formats.targets import TARGETS

SHIPPED = "ov2-vit-nano-8:rendered"
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def hf(folder: Path) -> Tensor:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()(IMAGES, output_hidden_states=True).hidden_states[-1][:, 1:]


def llava(folder: Path) -> Tensor:
    from transformers import LlavaForConditionalGeneration

    tower = LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower
    return tower.eval()(IMAGES, output_hidden_states=True).hidden_states[-1][:, 1:]


def timm(folder: Path) -> Tensor:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(IMAGES)[:, 1:]


def stock(folder: Path) -> Tensor:
    visual = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval().visual
    return visual.forward_intermediates(IMAGES, indices=1, output_fmt="NLC")["image_intermediates"][0]


def ours(folder: Path) -> Tensor:
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval().encode_image_tokens(IMAGES)


def onnx(folder: Path) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"))
    return torch.from_numpy(session.run(["tokens"], {"images": IMAGES.numpy()})[0])


READERS: dict[str, Callable[[Path], Tensor]] = {
    "hf": hf, "llava": llava, "timm": timm, "open-clip": stock, "ov2": ours, "released": ours, "onnx": onnx,
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_the_shipped_model_in_each_format(target: str, language_model: Path, tmp_path: Path) -> None:
    options = {"language_model": str(language_model)} if target == "llava" else {}
    training.export(SHIPPED, target, tmp_path / "out", **options)
    model = open_clip.create_model(SHIPPED.split(":")[0], pretrained="rendered").eval()
    with torch.no_grad():
        expected = model.encode_image_tokens(IMAGES)
        torch.testing.assert_close(READERS[target](tmp_path / "out"), expected, atol=5e-5, rtol=1e-5)
