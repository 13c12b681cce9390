"""A tiny model of each kind, a tar with pictures that cannot be used, and one process of two."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from PIL import Image
from probe_sets import encoded
from torch import Tensor

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.loader import EvalLoader
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.evaluate.classes import Classes
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.options import EvalOptions
from open_clip_ov2.evaluate.zero_shot import likelihood_retrieval, zero_shot_likelihood
from open_clip_ov2.openclip.models.eval_models import as_eval_model
from open_clip_ov2.openclip.models.factory import build_caption_model

BOS, EOS, LENGTH, SIDE = 49406, 49407, 12, 24
SETTINGS = Compute(torch.device("cpu"), "fp32", 1, EOS)
CLASSES = Classes.of({"c": "cat", "d": "dog", "e": "electric eel"})
TEMPLATES = ("{}", "a photo of a {}.")
# Key, label, captions; the pictures of the second and last cannot be decoded.
SAMPLES = [
    ("k0", "c", ["a cat", "one cat that sits"]),
    ("k1", "d", ["a broken dog"]),
    ("k2", "d", ["a dog", "a cat"]),
    ("k3", "x", ["an unknown thing"]),
    ("k4", "e", ["a dog"]),
    ("k5", "", ["no label here", "none"]),
    ("k6", "e", ["an eel in the sea"]),
    ("k7", "c", ["a broken cat"]),
]
BROKEN = ("k1", "k7")


def to_tensor(image: Image.Image) -> Tensor:
    larger = np.array(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), dtype=np.float32)
    return torch.from_numpy(larger / 128 - 1).permute(2, 0, 1)


def write_set(file: Path, broken: tuple[str, ...] = BROKEN) -> Path:
    with wds.TarWriter(str(file)) as tar:
        for number, (key, label, captions) in enumerate(SAMPLES):
            about = json.dumps({"label": label, "captions": captions}).encode()
            picture = b"not a picture" if key in broken else encoded(number)
            tar.write({"__key__": key, "png": picture, "json": about})
    return file


def tokenizer() -> Any:
    return open_clip.get_tokenizer("ov2-vit-nano-8")


def loader_of(file: Path, **changed: Any) -> EvalLoader:
    usual: dict[str, Any] = {
        "batch_size": 3, "num_workers": 0, "group_by": CaptionKey("json", ("label",)),
        "caption_keys": parse_caption_keys("json:captions"),
    }  # fmt: skip
    return EvalLoader(WebDatasetSource((str(file),)), to_tensor, tokenizer(), **{**usual, **changed})


def model(fusion: str = "prefix") -> CaptionModel:
    torch.manual_seed(0)
    made = build_caption_model(
        embed_dim=16,
        vision_cfg={"image_size": SIDE, "patch_size": 6, "width": 16, "layers": 1, "head_width": 8},
        text_cfg={"context_length": LENGTH, "vocab_size": 49408, "bos_id": BOS, "eos_id": EOS},
        decoder_cfg={"width": 16, "layers": 2, "heads": 2, "mlp_width": 32},
        fusion=fusion,
        keep_ratio=0.5,
    )
    with torch.no_grad():  # untrained, the image would hardly matter
        made.text_decoder.lm_head.weight.mul_(4)
        made.text_decoder.image_projection.weight.mul_(4)
    return made.eval()


def eval_model(**more: Any) -> EvalModel:
    return as_eval_model(model(), tokenizer(), SETTINGS, **more)


def options(**changed: Any) -> EvalOptions:
    return EvalOptions(data="", classes=CLASSES, templates=TEMPLATES, **changed)


def results(file: Path, **changed: Any) -> dict[str, Any]:
    one = eval_model()
    return {
        "classes": zero_shot_likelihood(one, loader_of(file, **changed), options(length_normalise=True)),
        "retrieval": likelihood_retrieval(one, loader_of(file, **changed), options()),
    }


def results_on_rank(rank: int, world_size: int, folder: Path) -> None:
    """Of both sets, the second with all of a process's pictures broken, to `folder/RANK.json`."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found = [results(folder / name, rank=rank, world_size=world_size) for name in ("some.tar", "half.tar")]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def pictures(keys: list[str]) -> Tensor:
    """As the loader gives them."""
    numbers = [[key for key, _, _ in SAMPLES].index(key) for key in keys]
    return torch.stack([to_tensor(Image.open(io.BytesIO(encoded(number)))) for number in numbers])
