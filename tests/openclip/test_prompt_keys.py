"""`ov2 train --prompt-keys`: captions with a text before them that is read and not predicted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from export_fixtures import make_run
from training import TINY, data_flags, results

from open_clip_ov2.cli import main
from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.core.packing import pack_captions
from open_clip_ov2.data.captions import PROMPT_END, cleaned, parse_caption_keys, with_prompt
from open_clip_ov2.openclip.models.open_model import open_model
from open_clip_ov2.openclip.models.tokenizer import PromptTokenizer


def test_the_loss_is_that_of_the_caption_after_its_prompt(tmp_path: Path) -> None:
    """Oracle: cross-entropy at the caption's tokens of a plain forward pass over prompt and caption; what generation
    reads of a prompt is what training reads. Rows with a long, a short and no prompt, and a caption that is cut."""
    run = make_run(tmp_path / "run")
    opened = open_model(run.folder)
    model, eos, length = opened.model, 2, 12
    pairs = [
        (" ".join(f"word{n}" for n in range(9)), "word1 word2"), ("word7", "word8 word9 word10"), ("", "word3"),
        ("word4 word5 word6 word7", " ".join(f"word{n}" for n in range(20, 35))),
    ]  # fmt: skip
    texts = PromptTokenizer(opened.tokenizer)([prompt + PROMPT_END + caption for prompt, caption in pairs])
    images = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(16).expand(4, -1)
    with torch.no_grad():
        sums = model(images, kept_idx=kept, captions=pack_captions(texts, eos, 4), caption_loss=CaptionLoss())
    total, count = 0.0, 0
    for row, (prompt, caption) in enumerate(pairs):
        given = [1, *opened.tokenizer.encode(prompt)][: length // 2]
        ids = torch.tensor([[*given, *opened.tokenizer.encode(caption), eos][:length]])
        if ids[0, -1] != eos:
            ids[0, -1] = eos
        with torch.no_grad():
            logits = model(images[row : row + 1], ids, kept_idx=kept[:1])["logits"][0]
        targets = ids[0, 1:].clone()
        targets[: len(given) - 1] = -100
        total += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        count += int((targets != -100).sum())
    assert int(sums.num_targets) == count
    assert float(sums.nll) == pytest.approx(total, rel=1e-5)


def test_prompts_are_drawn_by_weight_and_cleaned() -> None:
    """Oracle: the weights, counted; strings that must not reach a tokenizer."""
    sample = {"txt": b"red\x00 \x1e square", "json": b'{"alts": ["one", "two"]}'}
    keys = parse_caption_keys("txt=2,json:alts=1,none=1")
    rng = random.Random(0)
    drawn = [with_prompt(sample, "c", keys, rng) for _ in range(2000)]
    shares = {text: drawn.count(text) / 2000 for text in set(drawn)}
    wanted = {"red square :\x1ec": 0.5, "one :\x1ec": 0.125, "two :\x1ec": 0.125, "\x1ec": 0.25}
    assert shares.keys() == wanted.keys()
    assert all(shares[text] == pytest.approx(share, abs=0.04) for text, share in wanted.items())
    assert with_prompt({}, "c", keys, rng) == "\x1ec"
    assert with_prompt(sample, "c", keys, None) == "red square :\x1ec"
    assert cleaned("a <im<image>age>\u200b<|x|> b\ud800", ["<image>", "<|x|>"]) == "a <im age> b"
    assert len(cleaned("ab " * 5000)) <= 1000


def test_a_run_with_prompts(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains and validates; another flag is another run; CLIP refuses it. Oracle: run.json, metrics, errors."""
    flags = [*TINY, "--tokenizer", str(vocabulary), *data_flags(squares, 16), "--logs", str(tmp_path)]
    prompted = ["--prompt-keys", "txt=3,none=1", "--caption-keys", "json:recaption"]
    assert main(["train", *flags, *prompted, "--name", "run"]) == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["stages"][0]
    assert config["prompt_keys"] == ["txt=3", "none=1"]
    (val,) = results(tmp_path / "run", "val")
    assert val["num_samples"] == 10
    assert main(["train", *flags, "--prompt-keys", "txt", "--caption-keys", "json:recaption", "--name", "run"]) == 2
    assert "prompt_keys" in capsys.readouterr().err
    assert main(["train", *flags, *prompted, "--model", "ViT-B-32"]) == 2
    assert "--prompt-keys" in capsys.readouterr().err
