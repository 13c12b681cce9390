"""FLOPs, memory and parameters. Oracles: torch's FlopCounterMode and what autograd really keeps, on real models; a
published-style table computed by others; the parameter counts of the paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_clip_ov2.core import CaptionLoss, linear_loss
from open_clip_ov2.core.packing import pack_captions
from open_clip_ov2.openclip.models.model_facts import ModelFacts, meta_model, model_facts
from open_clip_ov2.recipe.model_costs import (
    LOSS_ROWS,
    PRECISION,
    Encoder,
    Memory,
    ModelSizes,
    Tokens,
    Tower,
    activation_bytes,
    fixed_bytes,
    flops,
    loss_bytes,
    sharded_bytes,
    stacks,
    total_flops,
)
from open_clip_ov2.train.parallel import blocks_of

NANO = "ov2-vit-nano-8"
BATCH = 3


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return open_clip.create_model(name, load_weights=False, **options).train()


def texts(model: Any, vocab: int, length: int) -> Tensor:
    """Captions without padding: every position is a target."""
    return torch.randint(1, min(vocab, 400), (BATCH, length))


def loss_of(model: Any, ids_BL: Tensor, resolution: int) -> Tensor:
    """What training minimises, on noise."""
    image = torch.rand(BATCH, 3, resolution, resolution)
    if hasattr(model, "token_drop"):
        packed = pack_captions(ids_BL, model.text_config.eos_id, 1)
        if not hasattr(model, "text"):
            return model(image, captions=packed, caption_loss=CaptionLoss()).objective
        loss = CaptionLoss(contrast=lambda image, text, scale: image.square().sum() + text.square().sum())
        sums = model(image, text=ids_BL, captions=packed, caption_loss=loss)
        return sums.objective + sums.contrastive
    out = model(image, ids_BL)
    features = (out["image_features"], out["text_features"]) if isinstance(out, dict) else out[:2]
    total = sum(feature.square().sum() for feature in features)
    if isinstance(model, CoCa):
        total = total + CaptionLoss()(out["logits"], out["labels"]).objective
    return total


def counted(model: Any, ids_BL: Tensor, resolution: int) -> float:
    """FLOPs of one image, forward and backward. The counter knows no fused attention on CPUs, so attention is taken
    apart into the matrix products that it does know."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of(model, ids_BL, resolution).backward()
    return counter.get_total_flops() / BATCH


def computed(facts: ModelFacts, mean_caption_tokens: float | None = None) -> tuple[float, Tokens]:
    tokens = facts.tokens(mean_caption_tokens)
    return total_flops(facts.sizes, facts.resolution, tokens), tokens


@pytest.mark.parametrize("fusion", ["prefix", "causal", "cross_attn"])
@pytest.mark.parametrize(("resolution", "keep"), [(64, 0.35), (48, 1.0)])
def test_ov2_agrees_with_the_flop_counter(fusion: str, resolution: int, keep: float) -> None:
    model = made(NANO, fusion=fusion, keep_ratio=keep, force_image_size=resolution)
    want, tokens = computed(model_facts(NANO, resolution=resolution, fusion=fusion, keep_ratio=keep))
    assert tokens.kept == int((resolution // 8) ** 2 * keep)
    assert counted(model, texts(model, 49408, 32), resolution) == pytest.approx(want, rel=0.02)


def test_only_real_targets_reach_the_head() -> None:
    model = made(NANO)
    ids_BL = texts(model, 49408, 32)
    ids_BL[:, 9:] = model.text_config.eos_id  # type: ignore[union-attr]
    want, _ = computed(model_facts(NANO), 9)
    assert counted(model, ids_BL, 64) == pytest.approx(want, rel=0.02)


def test_vision_patch_dropout_is_counted() -> None:
    model = made(NANO, force_patch_dropout=0.5)
    want, tokens = computed(model_facts(NANO, patch_dropout=0.5))
    assert tokens == Tokens(encoder=33, kept=11, text=31, targets=31.0)
    assert counted(model, texts(model, 49408, 32), 64) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(("name", "length"), [("clip_tiny", 16), ("coca_tiny", 16), ("coca_tiny", 12)])
def test_baselines_agree_with_the_flop_counter(baselines: Path, name: str, length: int) -> None:
    path = f"local-dir:{baselines / name}"
    model = made(path, force_context_length=length)
    nn.init.normal_(model.text_decoder.text_projection) if isinstance(model, CoCa) else None
    want, _ = computed(model_facts(path, context_length=length))
    assert counted(model, texts(model, 49408, length), 24) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("method", ["ov1-of-", "genlip-of-"])
def test_related_methods_agree_with_the_flop_counter(method: str) -> None:
    """Captions end early, so that OpenVision 1's text encoder computes padding and the decoder does not."""
    model = made(method + NANO, force_image_size=32)
    ids_BL = texts(model, 49408, 32)
    ids_BL[:, 9:] = model.text_config.eos_id  # type: ignore[union-attr]
    want, _ = computed(model_facts(method + NANO, resolution=32), 9)
    assert counted(model, ids_BL, 32) == pytest.approx(want, rel=0.02)


L14, DECODER_L = Tower(1024, 24, 16, 4096), Tower(768, 12, 12, 3072)
OV2_L = ModelSizes(Encoder(L14, 14, 1024, 1024, False), 32_000, decoder=DECODER_L)
OV2_SO = ModelSizes(Encoder(Tower(1152, 27, 16, 4304), 14, 1152, 1152, False), 32_000, decoder=DECODER_L)
CLIP_L = ModelSizes(Encoder(L14, 14, 1024, 768), 49_408, text=DECODER_L)
COCA_L = ModelSizes(Encoder(L14, 14, 768, 768), 49_408, decoder=DECODER_L, text=DECODER_L, queries=256)


def published(sizes: ModelSizes, resolution: int, tokens: Tokens) -> dict[str, float]:
    """FLOPs by part as published tables count them: the last blocks at all positions, and of causal attention the half
    that the mask needs."""
    found = {name: part.total for name, part in flops(sizes, resolution, tokens).items()}
    for stack in stacks(sizes, tokens):
        share = 1.0 if stack.part == "encoder" else 0.5
        whole = stack if stack.cross else replace(stack, queries=stack.keys, pairs=share * stack.keys**2)
        found[stack.part] += 3 * (whole.flops() - stack.flops())
    return found


@pytest.mark.parametrize(
    ("sizes", "resolution", "tokens", "gflop"),
    [
        (OV2_L, 84, Tokens(37, 12, 127, 127), 158),
        (OV2_L, 84, Tokens(37, 12, 64, 64), 116),
        (OV2_L, 224, Tokens(257, 89, 127, 127), 618),
        (OV2_L, 224, Tokens(257, 256, 127, 127), 709),
        (OV2_SO, 384, Tokens(730, 255, 127, 127), 2224),
        (COCA_L, 224, Tokens(257, 255, 127, 127), 731),
        (CLIP_L, 224, Tokens(257, 0, 77, 0), 525),
    ],
)
def test_the_table_of_floors(sizes: Any, resolution: int, tokens: Tokens, gflop: float) -> None:
    """Oracle: a table made independently, with half of the causal attention counted, and last blocks whole."""
    assert sum(published(sizes, resolution, tokens).values()) / 1e9 == pytest.approx(gflop, rel=0.004)


def test_openvision_1_in_the_table_of_floors() -> None:
    """Two captions through a text tower, and one through the decoder: 839 GFLOP in that table."""
    text = published(CLIP_L, 224, Tokens(257, 0, 128, 0))["text encoder"]
    ov2 = published(OV2_L, 224, Tokens(257, 256, 128, 128))
    assert (sum(ov2.values()) + 2 * text) / 1e9 == pytest.approx(839, rel=0.01)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("ov2-vit-l-14", 304), ("ov2-vit-so400m-14", 414), ("ov2-vit-h-14", 632), ("ov2-vit-g-14", 1013)],
)
def test_encoders_have_the_published_parameters(name: str, millions: int) -> None:
    """Oracle: the paper's and the model cards' counts (304 M, 412 M without a head, 632 M, 1.01 B)."""
    assert model_facts(name).parameters["encoder"] / 1e6 == pytest.approx(millions, abs=0.9)


@pytest.mark.parametrize(("name", "millions"), [("ov2-vit-bigg-14", 1843), ("ov2-vit-6b-14", 5903)])
def test_larger_encoders_have_the_published_parameters_too(name: str, millions: int) -> None:
    """Oracles: arXiv 2106.04560, table 2, and arXiv 2312.14238, table 1; without our last projection, the identity. And
    what FSDP gathers at once, counted in the model itself."""
    facts, model = model_facts(name), meta_model(name)
    assert (facts.parameters["encoder"] - model.visual.proj.numel()) / 1e6 == pytest.approx(millions, abs=0.6)
    sizes = {block: sum(p.numel() for p in block.parameters()) for block in blocks_of(model)}
    counted, whole = facts.trained + facts.frozen, sum(sizes.values())
    gathered = 2 * (counted - whole + max(sizes.values())) * 2 + max(sizes.values()) * (2 + 4)
    expected = (16 * facts.trained + 4 * facts.frozen) / 8 + gathered
    found = sharded_bytes(facts.sizes, facts.trained, facts.frozen, PRECISION["amp_bf16"], 8)
    assert found == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("name", ["ov2-vit-s-16", "ViT-S-16"])
def test_parts_add_up_to_the_model(name: str) -> None:
    """Oracle: the real model, built in memory."""
    facts, model = model_facts(name), made(name)
    assert sum(facts.parameters.values()) == facts.trained + facts.frozen
    assert facts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_word_pieces_change_the_head() -> None:
    assert model_facts("ov2-vit-l-14", tokenizer="bert-base-uncased").parameters["head"] == 32_000 * 768


def kept_by_autograd(model: Any, ids_BL: Tensor, resolution: int, dtype: torch.dtype | None) -> float:
    """Bytes of one image that autograd keeps, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = loss_of(model, ids_BL, resolution)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p.requires_grad)
    copies = 0 if dtype is None else weights * 2  # autocast's low-precision weights are no activations
    del loss
    return (sum(size for size, _ in kept.values()) - copies) / BATCH


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("amp_bf16", torch.bfloat16)])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attn"])
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, fusion: str, precision: str, dtype: torch.dtype | None
) -> None:
    """A small vocabulary: logits have a test of their own below. A CPU's autocast norms in bf16, a GPU's in fp32."""
    config = open_clip.get_model_config(NANO)
    config["text_cfg"].update(vocab_size=512, bos_id=510, eos_id=511)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    name = f"local-dir:{tmp_path}"
    model, facts = made(name, fusion=fusion), model_facts(name, fusion=fusion)
    _, tokens = computed(facts)
    as_here = replace(PRECISION[precision], norm=2) if dtype else PRECISION[precision]
    want = activation_bytes(facts.sizes, tokens, 64, as_here, grad_checkpointing=False)
    assert kept_by_autograd(model, texts(model, 500, 32), 64, dtype) == pytest.approx(want, rel=0.1)


def test_largest_batches_of_an_80_gb_gpu() -> None:
    """Oracle: the largest batch found for L/14 at 84 px with 128 tokens, 930 without the logits (590 with them)."""
    tokens, precision = Tokens(37, 12, 127, 127.0), PRECISION["amp_bf16"]
    each = activation_bytes(OV2_L, tokens, 84, precision, grad_checkpointing=False)
    fixed = fixed_bytes(439_000_000, 0, precision, 1)
    assert Memory(fixed, each).most_images(80e9) == pytest.approx(930, rel=0.1)


def test_a_loss_holds_one_chunk_of_logits() -> None:
    """By hand: 4,096 rows of 32,000 words in bfloat16, in float32, and their gradient in bfloat16; CoCa's all count."""
    precision = PRECISION["amp_bf16"]
    assert LOSS_ROWS == linear_loss.GPU_ROWS
    assert loss_bytes(OV2_L, precision) == 4096 * 32_000 * (2 + 4 + 2)
    assert loss_bytes(COCA_L, precision) == loss_bytes(CLIP_L, precision) == 0


def test_checkpointing_keeps_less() -> None:
    tokens, precision = Tokens(257, 89, 127, 127.0), PRECISION["amp_bf16"]
    usual, less = (
        activation_bytes(OV2_L, tokens, 224, precision, grad_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert less < usual / 4
