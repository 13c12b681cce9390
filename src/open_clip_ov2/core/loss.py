"""Caption loss: sum of the nll of the real target tokens over their number in the GLOBAL batch.

Shapes: B batch, L caption tokens, D decoder width, V vocabulary, T = B x L, R real targets among T.
Source: docs/reference.md, "Loss": loss = sum(nll * mask) / sum(mask), mask = targets that are not padding, the
end-of-text token included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.linear_loss import linear_cross_entropy, softmax_rows

IGNORE_INDEX = -100  # torch's own; stands for every padded target


def caption_targets(ids_BL: Tensor, eos_id: int) -> Tensor:
    """Targets of next-token prediction, `(B, L - 1)` int64, IGNORE_INDEX after the first end of text. `ids_BL` is [bos]
    caption [eos] padding; what the padding's id is does not matter (OpenCLIP's tokenizer pads with 0, which is also
    "!"). Negative ids are a prompt's and no targets (openclip/models/tokenizer.py)."""
    is_eos_BL = ids_BL == eos_id
    after_eos_BL = (is_eos_BL.cumsum(dim=1) - is_eos_BL.long()) > 0
    return ids_BL[:, 1:].masked_fill(after_eos_BL[:, 1:] | (ids_BL[:, 1:] < 0), IGNORE_INDEX)


class CaptionLossSums(NamedTuple):
    """What one (micro-)batch adds to the loss; scalars, float32 and int64."""

    nll: Tensor  # sum over real targets, nats
    objective: Tensor  # the same with label smoothing and z-loss where asked for
    num_targets: Tensor
    contrastive: Tensor | None = None  # a mean over this process's rows, float32, where a model has two losses


class CaptionLoss(nn.Module):
    """Sums over the real targets. The training step divides by their number in the global batch.

    `label_smoothing` in [0, 1) and `z_loss` >= 0 (its weight times the squared log partition function,
    PaLM, arXiv 2204.02311, section 5) are off by default, as in the reference. `contrast`: a contrastive loss of
    normalized features `(B, D)` of images and of texts and their scale, for a model that has both.
    """

    def __init__(
        self, *, label_smoothing: float = 0.0, z_loss: float = 0.0, contrast: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if not 0.0 <= z_loss < float("inf"):
            raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
        self.label_smoothing, self.z_loss, self.contrast = label_smoothing, z_loss, contrast
        self._softmax: Callable[..., Tensor] = softmax_rows

    def compile_softmax(self, **options: Any) -> None:
        """Compile the softmax over the logits of a chunk, with torch.compile's `options`."""
        self._softmax = torch.compile(softmax_rows, **options)

    def forward(self, logits: Tensor, labels: Tensor) -> CaptionLossSums:
        """`(..., V)` any float dtype, `(...)` int64 with IGNORE_INDEX. Computed in float32."""
        logits_TV, labels_T = logits.flatten(0, -2).float(), labels.flatten()

        def summed(smoothing: float) -> Tensor:
            return F.cross_entropy(
                logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
            )

        nll = summed(0.0)
        objective = summed(self.label_smoothing) if self.label_smoothing else nll
        real_T = labels_T != IGNORE_INDEX
        if self.z_loss:
            objective = objective + self.z_loss * (logits_TV.logsumexp(-1).square() * real_T).sum()
        return CaptionLossSums(nll, objective, real_T.sum())

    def from_hidden(self, hidden_RD: Tensor, lm_head: nn.Linear, labels_R: Tensor) -> CaptionLossSums:
        """The same from the decoder's hidden states `(R, D)` at the real targets `(R,)`, without all logits at once.
        Only the objective has a gradient."""
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        nll, objective = linear_cross_entropy(hidden_RD, lm_head.weight, labels_R, **options, softmax=self._softmax)
        return CaptionLossSums(nll, objective, torch.full((), len(labels_R), device=labels_R.device))
