"""The model. Oracles: attention written out, finite-difference-free dependence checks, equalities between paths."""

from __future__ import annotations

import pytest
import torch
from test_generate import EOS, tiny

from open_clip_ov2.core import FUSIONS, CaptionLoss, sincos_2d
from open_clip_ov2.core.packing import pack_captions
from open_clip_ov2.core.rows import prefix_mask


def test_position_table_is_not_open_clips() -> None:
    """Oracle: the figure established against the release, 0.021 at 16 x 16 x 1024."""
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    theirs = torch.from_numpy(get_2d_sincos_pos_embed(1024, 16, cls_token=True)).float()
    ours = sincos_2d((16, 16), 1024)
    assert (ours - theirs).abs().max().item() == pytest.approx(0.0214, abs=1e-4)
    assert not ours[0].any()


def test_position_table_of_a_larger_grid_contains_the_smaller_ones() -> None:
    """Absolute patch index: row y, column x has the same code at any grid."""
    small, large = sincos_2d((3, 5), 32)[1:], sincos_2d((7, 9), 32)[1:]
    assert torch.equal(small.view(3, 5, 32), large.view(7, 9, 32)[:3, :5])


def test_prefix_mask_written_out() -> None:
    plain = [[j < 3 or j <= i for j in range(7)] for i in range(7)]
    assert prefix_mask(3, 7).tolist() == plain


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_caption_token_sees_the_future_and_every_one_sees_the_image(fusion: str) -> None:
    """Oracle: the gradient of one position's logits is zero exactly at what it must not see."""
    model = tiny(fusion)
    tokens = torch.randn(1, 16, 16, requires_grad=True)
    ids = torch.tensor([[10, 1, 2, 3, 4, EOS]])
    seen: list[torch.Tensor] = []
    model.text_decoder.token_embedding.register_forward_hook(lambda _, __, out: seen.append(out))
    hidden = model.text_decoder(tokens, ids)
    image_grad, text_grad = torch.autograd.grad(hidden[0, 2].sum() + hidden[0, 2].square().sum(), (tokens, seen[0]))
    assert (image_grad.abs().sum(-1) > 0).all()
    assert (text_grad[:3].abs().sum(-1) > 0).all()
    assert not text_grad[3:].any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_trainable_parameter_gets_a_gradient(fusion: str) -> None:
    """An unused trainable parameter stops DDP at its second step."""
    model = tiny(fusion).train()
    ids = torch.tensor([[10, 1, 2, EOS, 0], [10, 5, EOS, 0, 0]])
    model(
        torch.randn(2, 3, 16, 16), captions=pack_captions(ids, EOS, 1), caption_loss=CaptionLoss()
    ).objective.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        "visual.positional_embedding",
        "visual.ln_post.weight",
        "visual.ln_post.bias",
        "visual.proj",
    }


def test_locking_leaves_untrained_parts_frozen() -> None:
    model = tiny()
    model.lock_image_tower()
    assert not any(p.requires_grad for p in model.visual.parameters())
    assert all(p.requires_grad for p in model.text_decoder.parameters())
    model.lock_image_tower(unlocked_groups=3)
    trainable = {name for name, p in model.visual.named_parameters() if p.requires_grad}
    assert trainable
    assert not trainable & {"ln_post.weight", "ln_post.bias", "proj", "positional_embedding"}


def test_outputs_of_the_open_clip_interface() -> None:
    model, image = tiny(), torch.randn(2, 3, 16, 16)
    ids = torch.tensor([[10, 1, 2, EOS, 0], [10, 5, EOS, 0, 0]])
    out = model(image, ids)
    assert out["logits"].shape == (2, 4, 12)
    assert out["labels"].tolist() == [[1, 2, EOS, -100], [5, EOS, -100, -100]]
    pooled, tokens = model(image).values()
    assert torch.equal(model.encode_image(image), pooled)
    assert torch.equal(model.encode_image_tokens(image), tokens)
    torch.testing.assert_close(model.encode_image(image, normalize=True).norm(dim=-1), torch.ones(2))
    expected = model.visual.ln_post(tokens.mean(1)) @ model.visual.proj
    torch.testing.assert_close(pooled, expected)
    with pytest.raises(ValueError, match="no text encoder"):
        model(None, ids)
