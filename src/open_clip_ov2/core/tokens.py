"""Visual-token dropping: the decoder sees a random subset of the patch tokens.

Shapes: B batch, N image tokens, K kept image tokens, D width (core/__init__.py).
Source: OpenVision 2 (arXiv 2509.01644), section 3; reference openvision2_model.py:118-133. It acts AFTER the
encoder; OpenCLIP's `--force-patch-dropout` (FLIP) drops at the encoder's input and is a separate knob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.rows import on_device


@dataclass(frozen=True)
class KeepRatio:
    """The fraction of patch tokens kept: one number (`low == high`), or a range drawn from at each step."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= self.high <= 1.0:
            raise ValueError(
                f"keep_ratio must lie in (0, 1], as one number (0.35) or a range low:high (0.25:1.0), got {self}"
            )

    @classmethod
    def of(cls, value: KeepRatio | float | str | list[float] | tuple[float, float]) -> KeepRatio:
        """`0.35`, `"0.35"`, `"0.25:1.0"` or `(0.25, 1.0)`. Raises ValueError, also outside (0, 1]."""
        if isinstance(value, KeepRatio):
            return value
        parts = value.split(":") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        try:
            numbers = [float(part) for part in parts]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) not in (1, 2):
            raise ValueError(f"keep_ratio must be a number (0.35) or a range low:high (0.25:1.0), got {value!r}")
        return cls(numbers[0], numbers[-1])

    def draw(self) -> float:
        """The ratio of one step. A range is drawn from by the CPU's default generator, so no device is waited for."""
        return self.at(float(torch.rand(()))) if self.low < self.high else self.low

    def at(self, draw: float) -> float:
        """The ratio at `draw`, 0 to 1, of the range."""
        return self.low + (self.high - self.low) * draw

    def __str__(self) -> str:
        return f"{self.low:g}:{self.high:g}" if self.low < self.high else f"{self.low:g}"


def num_kept(num_tokens: int, keep_ratio: float) -> int:
    """K = int(N * keep_ratio): 36 -> 12, 256 -> 89, 576 -> 201 at 0.35 (docs/reference.md). Raises ValueError if no
    token would be left."""
    if num_tokens < 1:
        raise ValueError("the image has no token: its resolution is below one patch")
    kept = int(num_tokens * keep_ratio)
    if kept < 1:
        raise ValueError(
            f"keep_ratio {keep_ratio:g} keeps none of {num_tokens} image tokens; "
            f"it must be at least {1 / num_tokens:.3g} at this resolution"
        )
    return kept


def sample_kept_indices(
    batch_size: int,
    num_tokens: int,
    kept: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of `kept` tokens for each example, without replacement, unsorted: `(B, K)` int64 on `device`, by its
    default generator unless one is given. No host synchronisation."""
    noise_BN = torch.rand(batch_size, num_tokens, device=device, generator=generator)
    return noise_BN.topk(kept, dim=1, sorted=False).indices


def sample_kept_of_rows(counts: Sequence[int], kept: Sequence[int], device: torch.device) -> Tensor:
    """The same for examples with `counts` tokens each, side by side: places among all of them, `kept` of each example
    in turn, int64 on `device`, by its default generator; in their order if all are kept."""
    if list(counts) == list(kept):
        return torch.arange(sum(counts), device=device)
    rows_B, counts_B = torch.arange(len(counts), device=device), on_device(counts, device)
    row_n = torch.repeat_interleave(rows_B, counts_B, output_size=sum(counts))
    noise_n = torch.rand(len(row_n), device=device).argsort()
    shuffled_n = noise_n[row_n[noise_n].argsort(stable=True)]  # row by row, at random within each
    kept_B = on_device(kept, device)
    skipped_B = F.pad((counts_B - kept_B).cumsum(0)[:-1], (1, 0))  # of the rows before
    first_I = torch.arange(sum(kept), device=device)
    return shuffled_n[first_I + torch.repeat_interleave(skipped_B, kept_B, output_size=sum(kept))]


def noise_of(seeds_B: Tensor, num_tokens: int) -> Tensor:
    """`(B, N)` int64 from 0 to 2^32 - 1, each row a function of its seed's lower 32 bits alone, on any device. Source:
    the hash lowbias32 (Chris Wellons, "Prospecting for Hash Functions", nullprogram.com, 2018)."""

    def mixed(x: Tensor) -> Tensor:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x

    return mixed(mixed(seeds_B & 0xFFFFFFFF)[:, None] ^ mixed(torch.arange(num_tokens, device=seeds_B.device)))


def gather_tokens(tokens_BND: Tensor, kept_idx_BK: Tensor) -> Tensor:
    """`(B, N, D)`, `(B, K)` int64 -> `(B, K, D)`."""
    return tokens_BND.gather(1, kept_idx_BK.unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1]))


class TokenDrop(nn.Module):
    """Draws a random subset of the image tokens of each example. In training the ratio is `keep_ratio`; in evaluation
    `eval_keep_ratio`, which is the training ratio unless set (the high end of a range), because a decoder is much worse
    at a ratio that it was not trained at."""

    def __init__(self, keep_ratio: KeepRatio, eval_keep_ratio: float | None = None) -> None:
        super().__init__()
        self.keep_ratio = keep_ratio
        self.eval_keep_ratio = keep_ratio.high if eval_keep_ratio is None else KeepRatio.of(eval_keep_ratio).high

    def of_samples(self, seeds_B: Tensor, num_tokens: int | Sequence[int], draw: float) -> dict[str, Any]:
        """Options of `forward` with which each sample's tokens follow from its seed `(B,)` int64 alone, and the ratio
        from `draw`, see `KeepRatio.at`. Samples may differ in their number of tokens."""
        ratio = self.keep_ratio.at(draw)
        if ratio >= 1:
            return {"keep_ratio": ratio}
        if isinstance(num_tokens, int):
            kept = num_kept(num_tokens, ratio)
            return {"kept_idx": noise_of(seeds_B, num_tokens).topk(kept, dim=1, sorted=False).indices}
        rows = zip(noise_of(seeds_B, max(num_tokens)), num_tokens, strict=True)
        return {"kept_idx": [row[:count].topk(num_kept(count, ratio), sorted=False).indices for row, count in rows]}

    def forward(
        self,
        batch_size: int,
        num_tokens: int,
        device: torch.device | str = "cpu",
        *,
        kept_idx: Tensor | None = None,
        keep_ratio: float | None = None,
    ) -> Tensor | None:
        """The tokens that are kept, `(B, K)` int64; None if all are: their order does not matter. `kept_idx` takes
        precedence over any ratio."""
        if kept_idx is not None:
            return kept_idx
        kept = num_kept(num_tokens, self.ratio(keep_ratio))
        return None if kept == num_tokens else sample_kept_indices(batch_size, num_tokens, kept, device=device)

    def ratio(self, given: float | None = None) -> float:
        """The ratio of one step: the one that is given, or the model's own."""
        if given is not None:
            return given
        return self.keep_ratio.draw() if self.training else self.eval_keep_ratio
