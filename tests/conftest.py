"""Shards and models that several tests use: real tars with colored squares, and tiny stock baselines."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from square_shards import COLORS, write_square_shards
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

# Or each process that a test starts, as some containers have it, compiles the whole package once more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Longest first: of two processes, the one that is done early takes the short files (measured with --durations).
LONG = (
    "slurm/", "openclip/test_fsdp", "openclip/test_resume", "openclip/test_train", "compare/", "vlm/", "formats/",
    "data/test_data_resume", "train/", "core/",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((place for place, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


@pytest.fixture(autouse=True)
def workers_end_with_the_test() -> Iterator[None]:
    """End the data workers that a test leaves. In a cycle of garbage each would hold up a later test for 5 s: the
    collector closes their queues first, and so they are not told to end."""
    begun: list[weakref.ref[Any]] = []
    start = _MultiProcessingDataLoaderIter.__init__

    def noted(iterator: Any, loader: Any) -> None:
        start(iterator, loader)
        begun.append(weakref.ref(iterator))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_MultiProcessingDataLoaderIter, "__init__", noted)
        yield
    for reference in begun:
        if (iterator := reference()) is not None:
            iterator._shutdown_workers()


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/00000..00003.tar (32 samples) and val/00000.tar (10 samples)."""
    folder = tmp_path_factory.mktemp("squares")
    write_square_shards(folder / "train", 4, 8)
    write_square_shards(folder / "val", 1, 10, start=1000)
    return folder


@pytest.fixture(scope="session")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock architectures, tiny, as OpenCLIP's `local-dir:` models: coca_tiny and clip_tiny."""
    folder = tmp_path_factory.mktemp("baselines")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 24, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    coca = {
        "embed_dim": 32,
        "vision_cfg": {**vision, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "attn_pooler_heads": 2},
        "custom_text": True,
    }
    clip = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    for name, cfg in (("coca_tiny", coca), ("clip_tiny", clip)):
        (folder / name).mkdir()
        (folder / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    return folder


def write_vocabulary(folder: Path) -> None:
    """For --tokenizer: word pieces of the squares' captions. A small head makes small checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({*COLORS, "a", "one", "square", "that", "is"})
    letters = [chr(code) for code in range(ord("b"), ord("z") + 1)]
    pieces = ["[PAD]", "[bos]", "[eos]", "[UNK]", *words, *letters, *(f"##{letter}" for letter in ["a", *letters])]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder)
    return folder
