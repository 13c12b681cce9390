"""Shards and models that several tests use: real tars with coloured squares, and tiny stock baselines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

# Longest first: of two processes, the one that is done early takes the short files (measured with --durations).
LONG = ("slurm/", "seam/test_resume", "seam/test_train", "export/", "data/test_data_resume", "loop/", "core/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((place for place, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 220), "black": (10, 10, 10)}


def write_square_shards(folder: Path, shards: int, samples: int, start: int = 0) -> list[Path]:
    """Tars of 32 px squares, captioned "a red square" in txt and, otherwise worded, in json."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for shard in range(shards):
        files.append(folder / f"{shard:05d}.tar")
        with wds.TarWriter(str(files[-1])) as tar:
            for index in range(samples):
                number = start + shard * samples + index
                name = list(COLOURS)[number % 4]
                image = Image.new("RGB", (32, 32), "white")
                image.paste(COLOURS[name], (4 + number % 7, 4 + number % 5, 24, 24))
                buffer = io.BytesIO()
                image.save(buffer, "png")
                about = {"recaption": [f"one {name} square", f"a square that is {name}"], "kind": name}
                tar.write(
                    {
                        "__key__": f"{number:06d}",
                        "png": buffer.getvalue(),
                        "txt": f"a {name} square",
                        "json": json.dumps(about).encode(),
                    }
                )
    return files


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
    words = sorted({*COLOURS, "a", "one", "square", "that", "is"})
    letters = [chr(code) for code in range(ord("b"), ord("z") + 1)]
    pieces = ["[PAD]", "[bos]", "[eos]", "[UNK]", *words, *letters, *(f"##{letter}" for letter in ["a", *letters])]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder)
    return folder
