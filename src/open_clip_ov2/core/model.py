"""CaptionModel: vision encoder, token dropping, text decoder; trained by the caption loss alone.

Shapes: B batch, N image tokens, K kept image tokens, L caption tokens, D width, V vocabulary.
Source: OpenVision 2 (arXiv 2509.01644); docs/reference.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.blocks import CrossBlock, SelfBlock
from open_clip_ov2.core.compute import within_budget
from open_clip_ov2.core.decoder import DecoderConfig, TextDecoder
from open_clip_ov2.core.generate import CaptionStream, GenerationConfig, generate
from open_clip_ov2.core.loss import CaptionLoss, CaptionLossSums, caption_targets
from open_clip_ov2.core.packing import PackedCaptions
from open_clip_ov2.core.positions import sincos_2d
from open_clip_ov2.core.tokens import KeepRatio, TokenDrop, num_kept
from open_clip_ov2.core.vit_fast import block_at, check_tower, image_features, kept_tokens


@dataclass(frozen=True)
class TextConfig:
    """Ids and lengths of the tokenizer that the model is trained with."""

    context_length: int
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int = 0


class CaptionModel(nn.Module):
    """ "CoCa without contrastive": no text encoder, no logit scale, no trained pooling head.

    `visual` maps images `(B, 3, H, W)` to `(pooled (B, D), patch tokens (B, N, D))`, tokens taken after the last
    block, class token dropped, final norm not applied (docs/reference.md: vit.py:786). It must have `grid_size`,
    `positional_embedding` (1 + N, D), `ln_post`, `proj`, `set_grad_checkpointing` and `lock`, as OpenCLIP's
    VisionTransformer has. The pooled output is for use after training: its norm and projection are frozen at
    one and the identity, since the caption loss never reaches them.
    """

    def __init__(
        self,
        visual: nn.Module,
        decoder: DecoderConfig,
        text: TextConfig,
        *,
        keep_ratio: KeepRatio,
        eval_keep_ratio: float | None = None,
        output_dict: bool = True,
    ) -> None:
        super().__init__()
        check_tower(visual)
        self.visual: Any = visual  # OpenCLIP's class, which this package does not know
        self.token_drop = TokenDrop(keep_ratio, eval_keep_ratio)
        width = visual.positional_embedding.shape[1]  # type: ignore[index]
        self.text_decoder = TextDecoder(decoder, int(width), text.vocab_size)
        self.text_config = text
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size
        self.output_dict = output_dict
        self.logit_bias = None  # OpenCLIP's checkpoint loader asks for it
        self._last_block: Any = block_at
        self.reset_position_table()
        self._freeze_untrained()
        rows, columns = cast(tuple[int, int], self.visual.grid_size)
        num_kept(rows * columns, min(keep_ratio.low, self.token_drop.eval_keep_ratio))  # raises if none are left

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last_block": block_at}  # compiled code is neither copied nor pickled

    def position_table(self) -> Tensor:
        """The fixed table of this model's grid, `(1 + N, D)` float32."""
        old = self.visual.positional_embedding
        return sincos_2d(self.visual.grid_size, old.shape[1], device=old.device)

    @torch.no_grad()
    def reset_position_table(self) -> None:
        table = self.position_table()
        self.visual.positional_embedding = nn.Parameter(table, requires_grad=False)

    def _freeze_untrained(self) -> None:
        """What the caption loss cannot reach must not be trainable: DDP would wait for it for ever."""
        self.visual.positional_embedding.requires_grad_(False)
        self.visual.ln_post.requires_grad_(False)
        if self.visual.proj is not None:
            self.visual.proj.requires_grad_(False)

    def encode_image_tokens(self, image: Tensor) -> Tensor:
        """All patch tokens, `(B, 3, H, W)` -> `(B, N, D)`, before the final norm."""
        return self.visual(image)[1]

    def encode_kept_tokens(
        self, image: Tensor, *, kept_idx: Tensor | None = None, keep_ratio: float | None = None
    ) -> Tensor:
        """The patch tokens that the decoder gets, `(B, 3, H, W)` -> `(B, K, D)`, with the model's own token dropping
        unless `kept_idx` `(B, K)` int64 or a ratio is given."""
        return kept_tokens(
            self.visual, image, self.token_drop, self._last_block, kept_idx=kept_idx, keep_ratio=keep_ratio
        )

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Pooled features, `(B, D)`: final norm of the mean patch token, times the projection."""
        pooled_BD = self.visual(image)[0]
        return F.normalize(pooled_BD, dim=-1) if normalize else pooled_BD

    def features(self, image: Tensor, *, layer: int = -1, norm: bool = False, class_token: bool = False) -> Tensor:
        """Patch tokens of any layer, see `core.image_features`."""
        return image_features(self.visual, image, layer=layer, norm=norm, class_token=class_token)

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        kept_idx: Tensor | None = None,
        keep_ratio: float | None = None,
        captions: PackedCaptions | None = None,
        caption_loss: CaptionLoss | None = None,
    ) -> dict[str, Tensor] | tuple[Tensor, ...] | CaptionLossSums:
        """One pass over images `(B, 3, H, W)` and ids `(B, L)` int64.

        `{"logits": (B, L - 1, V), "labels": (B, L - 1) int64, IGNORE_INDEX where padded}`, or that pair as a tuple if
        `output_dict` is off. Without text: `{"image_features": (B, D), "image_embs": (B, N, D)}`. With `captions` and
        `caption_loss` in place of text, the sums of the loss, computed inside so that DDP sees every parameter at work.
        `kept_idx` `(B, K)` or `keep_ratio` replace the model's own token dropping.
        """
        if image is None:
            raise ValueError("an ov2 model has no text encoder: give it images, or images and text")
        if (captions is None) != (caption_loss is None):
            raise ValueError("packed captions and a loss go together: give both or neither")
        if captions is not None and (text is not None or len(captions.order_B) != len(image)):
            raise ValueError("packed captions stand in place of text, one for each image")
        if text is None and captions is None:
            pooled_BD, tokens_BND = self.visual(image)
            image_out = {"image_features": pooled_BD, "image_embs": tokens_BND}
            return image_out if self.output_dict else tuple(image_out.values())
        kept_BKD = self.encode_kept_tokens(image, kept_idx=kept_idx, keep_ratio=keep_ratio)
        if captions is not None and caption_loss is not None:
            return self._loss_sums(kept_BKD, captions, caption_loss)
        assert text is not None
        labels_BL = caption_targets(text, self.text_config.eos_id)
        hidden_BLD = self.text_decoder(kept_BKD, text[:, :-1])
        out = {"logits": self.text_decoder.lm_head(hidden_BLD), "labels": labels_BL}
        return out if self.output_dict else tuple(out.values())

    def _loss_sums(self, kept_BKD: Tensor, captions: PackedCaptions, caption_loss: CaptionLoss) -> CaptionLossSums:
        kept_BKD = kept_BKD.index_select(0, captions.order_B)
        hidden_tD = self.text_decoder.packed(kept_BKD, captions.ids_t, captions.parts)
        hidden_RD = hidden_tD.index_select(0, captions.index_R)
        return caption_loss.from_hidden(hidden_RD, self.text_decoder.lm_head, captions.labels_R)

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        text: Tensor | None = None,
        *,
        seq_len: int | None = None,
        kept_idx: Tensor | None = None,
        keep_ratio: float | None = None,
        fixed_output_length: bool = False,
        **options: Any,
    ) -> Tensor:
        """Captions of `(B, 3, H, W)` images: ids `(B, T)` int64, bos first, padded after eos.

        `text` is a prompt of ids `(B, T)` or `(T,)`, bos included, without padding. `seq_len` is the longest
        result, the context length by default and at most. Further options are GenerationConfig's:
        generation_type ("greedy", "top_k", "top_p", "beam_search"), temperature, top_k, top_p, num_beams,
        length_penalty, min_seq_len, repetition_penalty, generator.
        Raises ValueError for a length beyond the context and for options out of range.
        """
        ids_BT = self._prompt(image, text)
        seq_len = self.context_length if seq_len is None else seq_len
        if not ids_BT.shape[1] < seq_len <= self.context_length:
            raise ValueError(
                f"seq_len must be more than the prompt's {ids_BT.shape[1]} tokens and at most the context length "
                f"{self.context_length}, got {seq_len}"
            )
        ids = self.text_config
        config = GenerationConfig(seq_len=seq_len, eos_id=ids.eos_id, pad_id=ids.pad_id, **options)
        was_training = self.training
        self.eval()
        try:
            kept_BKD = self.encode_kept_tokens(image, kept_idx=kept_idx, keep_ratio=keep_ratio)
            out_BT = generate(CaptionStream(self.text_decoder, kept_BKD, ids_BT), ids_BT, config)
        finally:
            self.train(was_training)
        return F.pad(out_BT, (0, seq_len - out_BT.shape[1]), value=ids.pad_id) if fixed_output_length else out_BT

    def _prompt(self, image: Tensor, text: Tensor | None) -> Tensor:
        if text is None:
            return torch.full((len(image), 1), self.text_config.bos_id, dtype=torch.long, device=image.device)
        text = text.expand(len(image), -1) if text.ndim == 1 else text
        if len(text) != len(image):
            raise ValueError(f"{len(text)} prompts for {len(image)} images")
        return text

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.text_decoder.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the encoder (LiT, arXiv 2111.07991) but for its last groups, as OpenCLIP counts them."""
        self.visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)
        self._freeze_untrained()

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        raise ValueError("an ov2 model has no text tower to lock (--lock-text); --lock-image locks its encoder")

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay leaves alone; the reference decays kernels only."""
        return {
            "visual.positional_embedding",
            "visual.class_embedding",
            "text_decoder.token_embedding.weight",
        }

    def compile_blocks(self, *, memory_budget: float | None = None, **options: Any) -> None:
        """Compile each block in place, with torch.compile's `options`. The state dict's keys stay as they are.

        Of the decoder's blocks only what works token by token is compiled, for any number of tokens. `memory_budget`, 0
        to 1, is the part of the activations that is kept for the backward pass, which recomputes the cheapest others;
        None keeps what torch.compile keeps by itself.
        """
        if memory_budget is not None:
            options["backend"] = within_budget(memory_budget)
        for block in self.visual.transformer.resblocks:
            block.compile(**options)
        self._last_block = torch.compile(block_at, **options)
        for block in self.text_decoder.blocks:
            cast(SelfBlock | CrossBlock, block).compile_tokenwise(**options)
