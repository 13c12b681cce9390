"""Related methods: OpenVision 1's pair of losses and GenLIP's one transformer on ov2's parts, and OpenCLIP's CoCa at
work (generation without a cache, the likelihood of candidate captions).

Shapes: B batch, R rows of image and candidate, C candidates, c those of a chunk, N image tokens, K kept image tokens,
L caption tokens, D width, V vocabulary.
Sources: OpenVision (arXiv 2505.04601), whose caption loss stands beside CLIP's (arXiv 2103.00020) as in CoCa (arXiv
2205.01917); GenLIP (arXiv 2605.00809).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core import (
    IGNORE_INDEX,
    CaptionLoss,
    CaptionModel,
    DecoderConfig,
    caption_targets,
    gather_tokens,
    native,
)
from open_clip_ov2.core.blocks import SelfBlock
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.core.generate import CaptionStream, GenerationConfig, generate
from open_clip_ov2.core.loss import CaptionLossSums
from open_clip_ov2.core.model import KeptIdx
from open_clip_ov2.core.native import Images, NativeImages
from open_clip_ov2.core.packing import PackedCaptions
from open_clip_ov2.core.rows import RaggedTokens
from open_clip_ov2.core.vit_fast import embedded
from open_clip_ov2.errors import UserError

HEAD_BYTES = 1 << 28  # ours: logits held at once, float32
OF_OV2 = ("memory_budget", "elementwise", "encoder")  # options of compile_blocks that torch.compile does not have
INIT_SCALE, MAX_SCALE = math.log(1 / 0.07), math.log(100)  # CLIP, section 2.5


class ContrastiveCaptionModel(CaptionModel):
    """OpenVision 1: an ov2 model with a text encoder, trained by a contrastive loss beside the caption loss. The pooled
    output of `visual` is compared with that of `text`, a tower from ids `(B, L)` to `(B, D)`, so here its norm and
    projection are trained. All tokens are pooled; the decoder gets what token dropping keeps."""

    def __init__(self, visual: nn.Module, *args: Any, text_tower: nn.Module, **options: Any) -> None:
        super().__init__(visual, *args, **options)
        self.text: Any = text_tower
        self.logit_scale = nn.Parameter(torch.full((), INIT_SCALE))

    def _freeze_untrained(self) -> None:
        self.visual.positional_embedding.requires_grad_(False)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Ids `(B, L)` int64 -> `(B, D)`."""
        text_BD = self.text(text)
        return F.normalize(text_BD, dim=-1) if normalize else text_BD

    def forward(
        self,
        image: Images | None = None,
        text: Tensor | None = None,
        *,
        captions: PackedCaptions | None = None,
        caption_loss: CaptionLoss | None = None,
        **drop: Any,
    ) -> dict[str, Tensor] | CaptionLossSums:
        """As CaptionModel's. With a loss that has `contrast`, `text` stands beside the packed captions, and the sums
        have the contrastive loss."""
        if image is None or text is None or captions is None or caption_loss is None or caption_loss.contrast is None:
            return super().forward(image, text, captions=captions, caption_loss=caption_loss, **drop)
        if isinstance(image, NativeImages):
            raise ValueError("a contrastive loss takes images of one shape")
        pooled_BD, tokens_BND = self.visual(image)
        kept_idx_BK = self.token_drop(len(tokens_BND), tokens_BND.shape[1], tokens_BND.device, **drop)
        kept_BKD = tokens_BND if kept_idx_BK is None else gather_tokens(tokens_BND, kept_idx_BK)
        contrastive = caption_loss.contrast(
            F.normalize(pooled_BD, dim=-1), self.encode_text(text, normalize=True), self.logit_scale.exp()
        )
        return self._loss_sums(kept_BKD, captions, caption_loss)._replace(contrastive=contrastive)

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        super().set_grad_checkpointing(enable, **options)
        self.text.set_grad_checkpointing(enable, **options)

    @torch.no_grad()
    def after_step(self) -> None:
        self.logit_scale.clamp_(0, MAX_SCALE)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"text.token_embedding.weight", "text.positional_embedding"}

    def compile_blocks(self, **options: Any) -> None:
        super().compile_blocks(**options)
        for block in self.text.transformer.resblocks:
            block.compile(**{key: value for key, value in options.items() if key not in OF_OV2})


class OneTransformerModel(CaptionModel):
    """GenLIP: the encoder's own blocks read patches and caption as one sequence, `[class token ; patches ; caption]`.

    Image tokens see image tokens alone, so what they become is the encoder's output, and the text decoder is the same
    blocks again, from the embedded patches on: it has an embedding, a norm and a head of its own, and no blocks. All
    tokens are kept.
    """

    def __init__(self, visual: nn.Module, decoder: DecoderConfig, *args: Any, **options: Any) -> None:
        blocks = list(cast(Any, visual).transformer.resblocks)
        own = DecoderConfig(
            blocks[0].attn.out_proj.in_features, len(blocks), blocks[0].attn.num_heads, blocks[0].mlp.c_fc.out_features
        )
        if decoder != own:
            raise ValueError(f"one transformer has the decoder of its encoder, {own}, not {decoder}")
        super().__init__(visual, decoder, *args, **options)
        if min(self.token_drop.keep_ratio.low, self.token_drop.eval_keep_ratio) < 1:
            raise ValueError("one transformer over image and caption drops no token: keep_ratio must be 1")
        self.text_decoder.use_blocks([_as_decoder_block(block) for block in blocks])

    def hook_blocks(self, hook: Callable[[nn.Module, str], None]) -> None:
        raise UserError("--fsdp: one transformer over image and caption uses each block in two places; train with DDP")

    def encode_kept_tokens(
        self, image: Images, *, kept_idx: KeptIdx | None = None, keep_ratio: float | None = None
    ) -> Tensor | RaggedTokens:
        """What the first block gets, `(B, 3, H, W)` -> `(B, 1 + N, D)`."""
        if kept_idx is not None or keep_ratio not in (None, 1.0):
            raise ValueError("one transformer over image and caption drops no token")
        if isinstance(image, NativeImages):
            return RaggedTokens(native.embedded(self.visual, image), tuple(count + 1 for count in image.counts))
        return embedded(self.visual, image)


def _as_decoder_block(block: Any) -> SelfBlock:
    """A block of the encoder, with the same parameters, as one of a decoder."""
    with torch.device("meta"):
        shared = SelfBlock(block.attn.out_proj.in_features, block.attn.num_heads, block.mlp.c_fc.out_features)
    shared.ln_1, shared.ln_2, shared.mlp = block.ln_1, block.ln_2, block.mlp
    shared.attn.in_proj_weight, shared.attn.in_proj_bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    shared.attn.out_proj = block.attn.out_proj
    return shared


# --- OpenCLIP's CoCa -----------------------------------------------------------------------------------


class CocaImages(NamedTuple):
    """What CoCa's forward takes in the place of images: `(B, D)`, `(B, N, D)`."""

    latent_BD: Tensor
    tokens_BND: Tensor

    def rows(self, rows: Tensor) -> CocaImages:
        return CocaImages(self.latent_BD.index_select(0, rows), self.tokens_BND.index_select(0, rows))


class CocaStream(CaptionStream):
    """OpenCLIP's CoCa generating one batch: it has no cache, so each token takes a whole forward pass."""

    def __init__(self, model: Any, images: CocaImages, ids_BT: Tensor) -> None:
        self._model, self._images, self._ids_BT = model, images, ids_BT[:, :0]
        self._takes_labels = "output_labels" in inspect.signature(model.forward).parameters  # OpenCLIP 4's has none
        self.advance(ids_BT)

    def advance(self, ids_BT: Tensor) -> None:
        self._ids_BT = torch.cat([self._ids_BT, ids_BT], dim=1)
        latent, tokens = self._images
        labels = {"output_labels": False} if self._takes_labels else {}
        out = self._model(None, self._ids_BT, image_latent=latent, image_embs=tokens, **labels)
        self.logits_BV = out["logits"][:, -1].float()

    def select(self, rows: Tensor) -> None:
        self._images, self._ids_BT = self._images.rows(rows), self._ids_BT.index_select(0, rows)
        self.logits_BV = self.logits_BV.index_select(0, rows)


def coca_captions(model: Any, eos_id: int, images: CocaImages, prompt_BT: Tensor, **options: Any) -> Tensor:
    """Prompts `(B, T)` int64 continued, `(B, T')`; options as for CaptionModel.generate. Raises ValueError."""
    seq_len = options.pop("seq_len", None) or model.context_length
    if not prompt_BT.shape[1] < seq_len <= model.context_length:
        least, most = prompt_BT.shape[1], model.context_length
        raise ValueError(f"seq_len must be above the prompt's {least} tokens and at most {most}, got {seq_len}")
    config = GenerationConfig(seq_len=seq_len, eos_id=eos_id, pad_id=model.pad_id, **options)
    return generate(CocaStream(model, images, prompt_BT), prompt_BT, config)


def coca_nll(model: Any, compute: Compute, images: CocaImages, texts_CL: Tensor) -> Tensor:
    """Sum of the nll of each candidate given each image, `(B, C)` float32. CoCa's text tower sees no image, so each
    candidate goes through it once; candidates come in chunks whose logits for all images fit into HEAD_BYTES."""
    batch, vocab = len(images.latent_BD), model.text_decoder.text_projection.shape[1]
    # Without the padding that all candidates have.
    longest = 1 + int((caption_targets(texts_CL, compute.eos_id) != IGNORE_INDEX).sum(dim=1).max())
    found = []
    for ids_cL in texts_CL[:, :longest].split(max(1, HEAD_BYTES // (4 * batch * longest * vocab))):
        ids_cL = ids_cL.to(compute.device)
        images_RND = images.tokens_BND.repeat_interleave(len(ids_cL), dim=0)
        with compute.evaluating():
            words_cLD = model.text(ids_cL)[1][:, :-1]
            logits_RLV = model.text_decoder(images_RND, words_cLD.repeat(batch, 1, 1))
        labels_RL = caption_targets(ids_cL, compute.eos_id).repeat(batch, 1)
        nll_RL = nn.functional.cross_entropy(
            logits_RLV.float().flatten(0, 1), labels_RL.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        found.append(nll_RL.view(batch, len(ids_cL), -1).sum(dim=2))
    return torch.cat(found, dim=1)
