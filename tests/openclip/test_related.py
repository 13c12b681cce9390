"""OpenVision 1's pair of losses and GenLIP's one transformer. Oracles are named at each test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from gradient_worker import EOS, PAIR, model_of, settings, whole_batch, write_gradients
from open_clip import ClipLoss, CoCaLoss
from torch import Tensor
from training import data_flags, finish, results, start_ranks

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.core import IGNORE_INDEX, CaptionLoss, caption_targets
from open_clip_ov2.evaluate.text.outcomes import read_outcomes
from open_clip_ov2.openclip.models.open_model import open_model
from open_clip_ov2.train.step import optimizer_step

ONE: dict[str, Any] = {"one_transformer": True, "decoder_cfg": {"width": 16, "layers": 2, "heads": 2, "mlp_width": 64}}
Gradients = dict[str, Tensor]


def step(model: Any, weights: tuple[float, float]) -> tuple[dict[str, Tensor], Gradients]:
    """Losses and gradients of one step of training on the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = settings(1, 1, weights=weights)
    loss = CaptionLoss(contrast=ClipLoss() if hasattr(model, "text") else None)
    found = optimizer_step(model, [whole_batch()], loss, optimizer, None, options)
    return found.losses(options), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Gradients, plain: Gradients) -> None:
    for name, gradient in plain.items():
        largest = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, atol=5e-6 * largest, rtol=0, msg=name)


def by_hand() -> tuple[Tensor, Tensor, Gradients]:
    """Contrastive and caption loss of the whole batch and the gradient of the first plus twice the second, in float64:
    softmax over all pairs written out (CLIP, figure 3), nll over all real targets (docs/reference.md)."""
    model: Any = model_of(**PAIR).double()
    images, ids = whole_batch().images_BCHW.double(), whole_batch().texts_BL
    tokens_BND = model.visual(images)[1]
    pooled = F.layer_norm(
        tokens_BND.mean(dim=1), (16,), model.visual.ln_post.weight, model.visual.ln_post.bias, eps=1e-6
    )
    image, text = pooled @ model.visual.proj, model.text(ids)
    cosine = (image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
    p = (cosine * model.logit_scale.exp()).exp()
    right = p.diag()
    contrastive = -((right / p.sum(dim=1)).log().mean() + (right / p.sum(dim=0)).log().mean()) / 2
    logits = model.text_decoder.lm_head(model.text_decoder(tokens_BND, ids[:, :-1]))
    log_p, nll = logits.log_softmax(dim=-1), []
    for row, length in enumerate((ids == EOS).int().argmax(dim=1).tolist()):
        nll += [-log_p[row, place, ids[row, place + 1]] for place in range(length)]
    caption = torch.stack(nll).mean()
    (contrastive + 2 * caption).backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return contrastive.float(), caption.float(), gradients


def test_the_pair_of_losses_equals_its_formula(tmp_path: Path) -> None:
    """Oracle: the formula by hand (`by_hand`), for one process and for two with half of the batch each."""
    contrastive, caption, plain = by_hand()
    losses, gradients = step(model_of(**PAIR), (2.0, 1.0))
    for name, value in {"contrastive_loss": contrastive, "caption_loss": caption}.items():
        torch.testing.assert_close(losses[name], value, atol=1e-6, rtol=0)
    torch.testing.assert_close(losses["loss"], contrastive + 2 * caption, atol=2e-6, rtol=0)
    assert_close(gradients, plain)
    done = finish(start_ranks(write_gradients, (tmp_path / "two.pt", 1, "fp32", True), 2))
    assert [status for status, _ in done] == [0, 0], done
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.testing.assert_close(two["losses"]["contrastive_loss"], contrastive, atol=1e-6, rtol=0)
    assert_close(two["gradients"], plain)
    model, loss = model_of(**PAIR), CaptionLoss(contrast=ClipLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="not accumulated"):
        optimizer_step(model, [whole_batch()] * 2, loss, optimizer, None, settings(1, 2))


def test_with_one_loss_off_it_is_clip_or_ov2_and_with_both_coca() -> None:
    """Oracles: OpenCLIP's ClipLoss and CoCaLoss on this model's features and logits; the ov2 model of the same weights,
    which the caption loss alone trains."""
    model: Any = model_of(**PAIR)
    images, ids = whole_batch().images_BCHW, whole_batch().texts_BL
    features = (model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True))
    clip = ClipLoss()(*features, model.logit_scale.exp())
    clip.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    losses, gradients = step(model_of(**PAIR), (0.0, 1.0))
    torch.testing.assert_close(losses["loss"], clip, atol=1e-6, rtol=0)
    assert_close(gradients, plain)
    assert all(gradients[name].abs().max() == 0 for name in gradients.keys() - plain.keys())

    alone, both = model_of(), model_of(**PAIR).state_dict()
    alone.load_state_dict({name: value for name, value in both.items() if name in alone.state_dict()})
    ov2_losses, plain = step(alone, (2.0, 1.0))
    losses, gradients = step(model_of(**PAIR), (2.0, 0.0))
    torch.testing.assert_close(losses["loss"], ov2_losses["loss"], atol=1e-6, rtol=0)
    assert_close(gradients, plain)

    labels = caption_targets(ids, EOS)
    pad = 99  # CoCaLoss leaves one id out; ours is no word of the vocabulary
    out, coca = model(images, ids), CoCaLoss(2.0, 1.0, pad_id=pad)
    targets = labels.masked_fill(labels == IGNORE_INDEX, pad)
    pair = coca(*features, out["logits"], targets, model.logit_scale.exp())
    losses, _ = step(model_of(**PAIR), (2.0, 1.0))
    torch.testing.assert_close(losses["loss"], sum(pair), atol=2e-6, rtol=0)


def test_one_transformer_is_one_sequence_through_stock_blocks() -> None:
    """Oracles: OpenCLIP's own blocks over [class token ; patches ; caption] with the prefix mask; greedy decoding by
    whole forward passes; the encoder alone, whose tokens captions do not change."""
    model: Any = model_of(**ONE)
    images, ids = whole_batch().images_BCHW, whole_batch().texts_BL

    def joint(ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        image_BSD = model.visual._embeds(images)
        x, first = torch.cat([image_BSD, model.text_decoder.token_embedding(ids_BL)], dim=1), image_BSD.shape[1]
        sees = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        sees[:, :first] = True
        mask = torch.zeros(sees.shape).masked_fill(~sees, -math.inf)
        for block in model.visual.transformer.resblocks:
            x = block(x, attn_mask=mask)
        return x[:, 1:first], model.text_decoder.lm_head(model.text_decoder.ln_final(x[:, first:]))

    tokens, logits = joint(ids[:, :-1])
    labels = caption_targets(ids, EOS)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    (2 * loss).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(model.encode_image_tokens(images), tokens, atol=1e-5, rtol=0)
    losses, gradients = step(model_of(**ONE), (2.0, 1.0))
    torch.testing.assert_close(losses["caption_loss"], loss, atol=1e-6, rtol=0)
    assert_close(gradients, plain)
    assert gradients.keys() == plain.keys()
    assert not any(name.startswith("text_decoder.blocks") for name in model.state_dict())

    written = torch.full((len(images), 1), model.text_config.bos_id)
    for _ in range(4):
        written = torch.cat([written, joint(written)[1][:, -1:].argmax(dim=-1)], dim=1)
    found = model.generate(images, seq_len=5)
    for row, want in zip(found.tolist(), written.tolist(), strict=True):
        end = want.index(EOS) + 1 if EOS in want else len(want)
        assert row[:end] == want[:end]
    with pytest.raises(ValueError, match="drops no token"):
        model.encode_kept_tokens(images, keep_ratio=0.5)
    with pytest.raises(ValueError, match="keep_ratio must be 1"):
        open_clip.create_model("genlip-of-ov2-vit-nano-8", keep_ratio=0.5)


@pytest.mark.parametrize("method", ["ov1", "genlip"])
def test_trained_evaluated_and_opened_again(
    method: str, squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the loss falls; the model that the folder opens writes the captions of the one that was converted."""
    name = f"{method}-of-ov2-vit-nano-8"
    size = ["--force-image-size", "24", "--force-context-length", "12"]
    train = [
        "train",
        "--model",
        name,
        "--tokenizer",
        str(vocabulary),
        *size,
        *data_flags(squares, 96),
        "--logs",
        str(tmp_path),
        "--name",
        "run",
    ]
    assert ov2(train) == 0
    rows = results(tmp_path / "run", "train")
    assert rows[-1]["caption_loss"] < rows[0]["caption_loss"]
    assert ("contrastive_loss" in rows[-1]) == (method == "ov1")
    data = ["--data", f"{squares}/val/00000.tar", "--workers", "0"]
    assert ov2(["eval", str(tmp_path / "run"), *data]) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert {"caption-loss", "caption", "read-text"} <= found.keys()
    assert ("retrieval" in found) == (method == "ov1")
    keys, values = read_outcomes(tmp_path / "run" / "eval.npz")["read-text.exact_match"]  # what the mean is taken of
    assert len(set(keys)) == len(values) == found["read-text"]["pictures"] == 10
    assert values.mean() == found["read-text"]["exact_match"]
    assert ov2(["convert", str(tmp_path / "run"), "--to", str(tmp_path / "whole")]) == 0
    images, written = torch.rand(2, 3, 24, 24), []
    for folder in ("run", "whole"):
        model: Any = open_model(str(tmp_path / folder)).model
        model.eval()
        with torch.no_grad():
            written.append((model.generate(images), model.encode_image(images)))
    assert torch.equal(written[0][0], written[1][0])
    assert torch.equal(written[0][1], written[1][1])
    slip = {"ov1": ["--accum-freq", "2"], "genlip": ["--keep-ratio", "0.5"]}[method]
    assert ov2([*train[:-1], "slip", *slip]) == 2
    assert {"ov1": "in one pass", "genlip": "keep_ratio must be 1"}[method] in capsys.readouterr().err
