"""Golden files of the authors' JAX release, and the same model in ours with their parameters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.formats import from_flax
from open_clip_ov2.openclip.models.factory import build_caption_model

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("concat_prefix_keep0.35", "concat_causal_keep0.35", "cross_attn_keep1.0")


class GoldenCase:
    """One recorded case: arrays by name, and what `meta` says."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.fusion = name.split("_keep")[0].removeprefix("concat_")

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[key]))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) float32; the reference's are channels last."""
        return self["in/images"].permute(0, 3, 1, 2).contiguous()

    def build(self) -> CaptionModel:
        image, text = self.meta["image"], self.meta["text"]
        model = build_caption_model(
            embed_dim=image["width"],
            vision_cfg={
                "image_size": self.images.shape[-1],
                "patch_size": image["patch_size"][0],
                "width": image["width"],
                "layers": image["depth"],
                "head_width": image["width"] // image["num_heads"],
                "mlp_ratio": image["mlp_dim"] / image["width"],
            },
            text_cfg={"context_length": 16, "vocab_size": text["vocab_size"], "bos_id": 1, "eos_id": 2},
            decoder_cfg={
                "width": text["width"],
                "layers": text["depth"],
                "heads": text["num_heads"],
                "mlp_width": text["mlp_dim"],
            },
            fusion=self.fusion,
            keep_ratio=self.meta["keep_ratio"],
        )
        parameters = from_flax(self.group("params/"))
        missing, unexpected = model.load_state_dict(parameters, strict=False)
        assert not unexpected
        assert set(missing) == {"visual.positional_embedding", "visual.proj"}, missing
        return model
