"""Golden files of the authors' JAX release, and the same model in ours with their parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.seam.factory import build_caption_model

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


_BLOCK_NAMES = {
    "LayerNorm_0": "ln_1", "LayerNorm_1": "ln_2", "ln_x": "ln_1", "ln_u": "ln_context", "ln_mlp": "ln_2",
    "MlpBlock_0/Dense_0": "mlp.c_fc", "MlpBlock_0/Dense_1": "mlp.c_proj",
}  # fmt: skip
_TOP_NAMES = {
    "img_encoder/cls": "visual.class_embedding",
    "img_encoder/embedding/kernel": "visual.conv1.weight",
    "img_encoder/encoder_norm/scale": "visual.ln_post.weight",
    "img_encoder/encoder_norm/bias": "visual.ln_post.bias",
    "txt_decoder/Embed_0/embedding": "text_decoder.token_embedding.weight",
    "txt_decoder/image_projection_layer/kernel": "text_decoder.image_projection.weight",
    "txt_decoder/decoder_norm/scale": "text_decoder.ln_final.weight",
    "txt_decoder/decoder_norm/bias": "text_decoder.ln_final.bias",
    "txt_decoder/head/kernel": "text_decoder.lm_head.weight",
}


def _block_prefix(tower: str, kind: str, index: int) -> str:
    if tower == "img_encoder":
        return f"visual.transformer.resblocks.{index}."
    number = {"encoderblock": index, "self_attn_block": 2 * index, "cross_attn_block": 2 * index + 1}[kind]
    return f"text_decoder.blocks.{number}."


def _to_torch(name: str, value: np.ndarray) -> Tensor:
    """Flax kernels are (in, out); convolutions (h, w, in, out)."""
    tensor = torch.from_numpy(np.array(value))
    if name.endswith("/kernel"):
        return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return tensor.flatten() if name.endswith("/cls") else tensor


def from_flax(flat: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """State dict from Flax parameters by path; query, key and value are stacked into in_proj."""
    out: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        if name in _TOP_NAMES:
            out[_TOP_NAMES[name]] = _to_torch(name, value)
            continue
        found = re.fullmatch(r"(\w+)/Transformer/([a-z_]+?)_(\d+)/(.+)/(\w+)", name)
        assert found, name
        tower, kind, index, part, leaf = found.groups()
        prefix = _block_prefix(tower, kind, int(index))
        suffix = {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]
        if not part.startswith("MultiHead"):
            out[f"{prefix}{_BLOCK_NAMES[part]}.{suffix}"] = _to_torch(name, value)
            continue
        projection = part.split("/")[1]
        if value.ndim == 3:  # heads kept apart: (in, heads, dim), and (heads, dim, out) for `out`
            value = value.reshape(-1, value.shape[-1]) if projection == "out" else value.reshape(value.shape[0], -1)
        if leaf == "bias":
            value = value.reshape(-1)
        if projection == "out":
            out[f"{prefix}attn.out_proj.{suffix}"] = _to_torch(name, value)
        else:
            attention.setdefault(f"{prefix}attn.in_proj_{suffix}", {})[projection] = _to_torch(name, value)
    for name, parts in attention.items():
        out[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return out
