"""Every architecture under evaluation. Oracle: a whole forward pass for each pair of an image and a caption, and
generation of each image on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import CustomTextCLIP
from PIL import Image
from torch import Tensor, nn

from open_clip_ov2.core import FUSIONS, CaptionModel, VisionModel, caption_targets
from open_clip_ov2.core.candidates import caption_trees
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import caption_loss, eval_kept_idx
from open_clip_ov2.openclip.models.eval_models import as_eval_model
from open_clip_ov2.openclip.models.factory import build_caption_model
from open_clip_ov2.openclip.models.open_evaluated import open_eval_model

BOS, EOS = 49406, 49407
KEYS = ["a", "b", "c"]
CAPTIONS = [
    "a red square", "a red circle", "a", "", "blue", "a red square and a very blue circle that fills it",
    "a red square",
]  # fmt: skip
PROMPTS = ["what is it", "a", "one two three"]


def settings(precision: str = "fp32") -> Compute:
    return Compute(torch.device("cpu"), precision, 1, EOS)


def ov2(fusion: str) -> CaptionModel:
    torch.manual_seed(0)
    model = build_caption_model(
        embed_dim=16,
        vision_cfg={"image_size": 24, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
        text_cfg={"context_length": 16, "vocab_size": 49408, "bos_id": BOS, "eos_id": EOS},
        decoder_cfg={"width": 16, "layers": 4, "heads": 2, "mlp_width": 32},
        fusion=fusion,
        keep_ratio=0.5,
    )
    with torch.no_grad():  # untrained, all captions are about equally likely
        model.text_decoder.lm_head.weight.mul_(2)
        model.text_decoder.token_embedding.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def stock(baselines: Path) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    models = {
        name: open_clip.create_model(f"local-dir:{baselines}/{name}", load_weights=False, output_dict=True).eval()
        for name in ("coca_tiny", "clip_tiny")
    }
    with torch.no_grad():
        nn.init.normal_(models["coca_tiny"].text_decoder.text_projection, std=0.5)  # OpenCLIP leaves it empty
    return models


def eval_model(model: nn.Module, **more: Any) -> Any:
    return as_eval_model(model, open_clip.get_tokenizer("ov2-vit-nano-8"), settings(), **more)


def tokenized(texts: list[str]) -> Tensor:
    return open_clip.get_tokenizer("ov2-vit-nano-8")(texts, context_length=16)


def images() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def pair_nll(model: nn.Module, image_1CHW: Tensor, key: str, ids_1L: Tensor) -> float:
    more = {"kept_idx": eval_kept_idx(model, [key])} if isinstance(model, CaptionModel) else {}
    with torch.no_grad():
        logits = model(image_1CHW, ids_1L, **more)["logits"]
    labels = caption_targets(ids_1L, EOS)
    logits = logits[:, : labels.shape[1]]  # OpenCLIP 4's CoCa has one more
    return float(nn.functional.cross_entropy(logits[0].double(), labels[0], reduction="sum"))


@pytest.mark.parametrize(
    ("kind", "max_nodes"), [*((fusion, 7) for fusion in FUSIONS), ("prefix", 1), ("prefix", 256), ("coca", 4)]
)
def test_likelihood_is_that_of_whole_passes(
    kind: str, max_nodes: int, stock: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a pass for each pair; to 1e-4 in sums of some 50 nats, whichever candidates share a tree."""
    monkeypatch.setattr("open_clip_ov2.core.candidates.MAX_NODES", max_nodes)
    monkeypatch.setattr("open_clip_ov2.core.candidates.CPU_ROWS", 11)
    monkeypatch.setattr("open_clip_ov2.openclip.models.related.HEAD_BYTES", 4 * 3 * 49408 * max_nodes)
    model = stock["coca_tiny"] if kind == "coca" else ov2(kind).eval()
    texts = tokenized(CAPTIONS)
    one = eval_model(model)
    found = one.nll(one.prefix(images(), KEYS), texts)
    pairs = [[pair_nll(model, images()[i : i + 1], KEYS[i], texts[c : c + 1]) for c in range(7)] for i in range(3)]
    torch.testing.assert_close(found.double(), torch.tensor(pairs).double(), atol=1e-4, rtol=0)
    assert found.std(dim=0).max() > 1e-2  # the image matters
    assert one.num_targets(texts).tolist() == [4, 4, 2, 1, 2, 12, 4]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_equal_captions_are_equally_likely_and_images_do_not_see_each_other(fusion: str) -> None:
    """Bit for bit in the first; in the second, oracle: each image on its own."""
    one, texts = eval_model(ov2(fusion)), tokenized(CAPTIONS)
    together = one.nll(one.prefix(images(), KEYS), texts)
    assert torch.equal(together[:, 0], together[:, 6])
    apart = [one.nll(one.prefix(images()[i : i + 1], KEYS[i : i + 1]), texts) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=0)


def test_all_tokens_where_all_are_asked_for() -> None:
    """Oracle: a whole pass with every token kept, of a model that by itself keeps half of them."""
    model, texts = ov2("prefix").eval(), tokenized(CAPTIONS[:1])
    one = eval_model(model, keep_ratio=1.0)
    with torch.no_grad():
        logits = model(images(), texts.expand(3, -1), keep_ratio=1.0)["logits"]
    labels = caption_targets(texts, EOS).expand(3, -1)
    wanted = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
    torch.testing.assert_close(one.nll(one.prefix(images(), KEYS), texts)[:, 0], wanted, atol=1e-4, rtol=0)


def test_sums_are_those_of_the_caption_loss() -> None:
    """Oracle: `loss_sums` over a batch, also at another keep ratio."""
    from open_clip_ov2.data.loader import Batch

    model, texts = ov2("prefix"), tokenized(CAPTIONS[:3])
    batch = Batch(images(), texts, KEYS, CAPTIONS[:3], [""] * 3, {})
    losses = []
    for keep_ratio in (None, 0.25):
        one = eval_model(model, keep_ratio=keep_ratio)
        nll = one.nll(one.prefix(images(), KEYS), texts).diagonal().sum() / one.num_targets(texts).sum()
        losses.append(caption_loss(one, [batch])["caption_loss"])
        assert float(nll) == pytest.approx(losses[-1], abs=1e-5)
    assert losses[0] != losses[1]


def test_a_tree_computes_a_beginning_once() -> None:
    """Hand-computed: 3 captions of 3, 3 and 2 inputs whose first two, and first one, are the same."""
    texts = torch.tensor([[9, 1, 2, 8, 0], [9, 3, 8, 0, 0], [9, 1, 4, 8, 0]])
    (tree,) = caption_trees(texts, 8, 100)
    assert tree.ids_T.tolist() == [9, 1, 2, 4, 3]
    assert tree.sees_TT.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    assert list(zip(tree.node_E.tolist(), tree.target_E.tolist(), strict=True)) == [
        (0, 1), (0, 3), (1, 2), (1, 4), (2, 8), (3, 8), (4, 8),
    ]  # fmt: skip
    assert tree.candidates_C.tolist() == [0, 2, 1]
    assert tree.edges_CM.tolist() == [[0, 2, 4], [0, 3, 5], [1, 6, 7]]
    assert [len(one.candidates_C) for one in caption_trees(texts, 8, 3)] == [1, 1, 1]


@pytest.mark.parametrize("kind", [*FUSIONS, "coca"])
@pytest.mark.parametrize("how", [{}, {"generation_type": "beam_search", "num_beams": 3}])
def test_what_follows_prompts_of_unequal_length(kind: str, how: dict[str, Any], stock: dict[str, nn.Module]) -> None:
    """Oracle: each image alone; for greedy, the most likely next token of a whole pass, again and again."""
    model = stock["coca_tiny"] if kind == "coca" else ov2(kind).eval()
    one = eval_model(model)
    found = one.generate(images(), KEYS, PROMPTS, seq_len=12, **how)
    alone = [one.generate(images()[i : i + 1], [KEYS[i]], [PROMPTS[i]], seq_len=12, **how)[0] for i in range(3)]
    assert found == alone
    assert any(found)
    if how:
        return
    tokenizer = open_clip.get_tokenizer("ov2-vit-nano-8")
    for i, prompt in enumerate(PROMPTS):
        ids = [BOS, *tokenizer.encode(prompt)]
        start = len(ids)
        more = {"kept_idx": eval_kept_idx(model, [KEYS[i]])} if kind != "coca" else {}
        while len(ids) < 12 and ids[-1] != EOS:
            with torch.no_grad():
                logits = model(images()[i : i + 1], torch.tensor([[*ids, 0]]), **more)["logits"]
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        assert found[i] == tokenizer.decode([token for token in ids[start:] if token != EOS]).strip()


def test_contrast_is_open_clips_own(stock: dict[str, nn.Module]) -> None:
    for model in stock.values():
        one, texts = eval_model(model), tokenized(CAPTIONS)
        with torch.no_grad():
            out = model(images(), texts[:3])
        torch.testing.assert_close(one.contrast_images(images()), out["image_features"])
        torch.testing.assert_close(one.contrast_texts(texts)[:3], out["text_features"])


def test_patch_tokens_of_timm() -> None:
    """Oracle: what leaves the blocks of timm's own ViT, without its class token, and the last stage of its ConvNeXt."""
    torch.manual_seed(0)
    model = CustomTextCLIP(
        8,
        {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"},
        {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    ).eval()
    seen: list[Tensor] = []
    for block in model.visual.trunk.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.encode_image(pixels)
    blocks, one = list(seen), eval_model(model)
    prefix = model.visual.trunk.num_prefix_tokens
    for layer in (-1, -2):
        torch.testing.assert_close(one.tokens(pixels, layer), blocks[layer][:, prefix:])


def test_pixels() -> None:
    """Oracle: the pixels themselves, one by one."""
    model = open_eval_model("pixels:2", torch.device("cpu"))
    picture = Image.fromarray(
        np.array([[0, 0, 40, 40], [0, 0, 40, 40], [80, 80, 120, 120], [80, 80, 120, 120]], np.uint8)
    )
    (features,) = model.pooled(model.preprocess(picture.convert("RGB"))[None]).tolist()
    assert [255 * one for one in features] == pytest.approx([-60, -20, 20, 60], abs=1e-4)
    assert model.abilities == {"features"}
    with pytest.raises(UserError, match="pixels:2: has no patch tokens"):
        model.tokens(model.preprocess(picture)[None])
    for wrong in ("pixels:", "pixels:x", "pixels:0", "pixels:1000"):
        with pytest.raises(UserError, match="expected pixels:SIDE"):
            open_eval_model(wrong, torch.device("cpu"))


def test_untrained_weights_are_drawn_with_one_seed() -> None:
    before = torch.random.get_rng_state()
    one, other = (open_eval_model("ov2-vit-nano-8:random", torch.device("cpu")) for _ in range(2))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.tokens(pixels), other.tokens(pixels))
    assert torch.equal(before, torch.random.get_rng_state())


def test_abilities_and_features(stock: dict[str, nn.Module]) -> None:
    """Patch tokens are those before any norm or pooler: 36 of a 24 px picture in patches of 4, 9 of 8."""
    encoder = VisionModel(ov2("prefix").visual)
    wanted = [
        (ov2("prefix"), {"features", "caption", "dropping"}, 36),
        (encoder, {"features"}, 36),
        (stock["coca_tiny"], {"features", "caption", "contrast"}, 9),
        (stock["clip_tiny"], {"features", "contrast"}, 9),
    ]
    for model, abilities, patches in wanted:
        one = eval_model(model)
        assert one.abilities == abilities
        assert one.tokens(images()).shape[:2] == (3, patches)
        torch.testing.assert_close(one.pooled(images()), model.encode_image(images(), normalize=False))
    with pytest.raises(UserError, match="a VisionModel cannot caption"):
        eval_model(encoder).generate(images(), KEYS)
    with pytest.raises(UserError, match="enc: a VisionModel cannot read text"):
        eval_model(encoder, name="enc").tokenize(["a"])
    with pytest.raises(UserError, match="Linear: cannot be evaluated"):
        eval_model(nn.Linear(1, 1))
