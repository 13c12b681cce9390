"""The model in the package reads: held-out pictures drawn here, captioned without a checkpoint or a network.

Oracle: the captions that the pictures were drawn from. The same model with random weights fails every share below.
"""

from __future__ import annotations

import importlib
import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch

from open_clip_ov2.openclip.models.tokenizer import decode_caption

pytest.importorskip("wonderwords")
pytest.importorskip("font_roboto")
SCRIPTS = Path(__file__).parents[2] / "scripts"
NAME, TAG = "ov2-vit-nano-8", "rendered"
PICTURES = 10  # of each kind
SHARES = {"shapes": 0.8, "charts": 0.8, "words": 0.7, "new words": 0.5}


@pytest.fixture(scope="module")
def data() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module("rendered_data")


def right(data: ModuleType, model: torch.nn.Module) -> Counter[str]:
    """How many pictures of each kind are captioned exactly right, greedily, with all tokens."""
    _, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=TAG)
    tokenizer = open_clip.get_tokenizer(f"{NAME}:{TAG}")
    fonts = data.rendered_text.font_files(data.rendered_text.TRAINED_FONTS)
    settings = data.Settings(0, 0, short_length=3, held_out=0, seed=9, size=96, fonts=())
    job = data.Job(settings, fonts, ())
    seeds = [(kind, f"{kind}{number}") for kind in SHARES for number in range(PICTURES)]
    drawn = [data.draw(kind, "held-out", job, random.Random(seed)) for kind, seed in seeds]
    with torch.no_grad():
        ids = model.eval().generate(torch.stack([preprocess(picture) for picture, _, _ in drawn]), seq_len=30)
    found: Counter[str] = Counter()
    for number, (row, (_, caption, _)) in enumerate(zip(ids, drawn, strict=True)):
        kind = list(SHARES)[number // PICTURES]
        found[kind] += decode_caption(tokenizer, row, 1, 2) == caption
    return found


def test_it_reads_pictures_that_it_has_not_seen(data: ModuleType) -> None:
    found = right(data, open_clip.create_model(NAME, pretrained=TAG))
    assert all(found[kind] >= share * PICTURES for kind, share in SHARES.items()), found


def test_random_weights_do_not(data: ModuleType) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(f"{NAME}:{TAG}", load_weights=False)
    assert not any(right(data, model).values())
