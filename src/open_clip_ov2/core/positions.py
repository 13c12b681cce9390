"""The reference's fixed position table. Shapes: N image tokens, D width (core/__init__.py)."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 10_000.0  # reference: vit.py:146


def sincos_2d(grid: tuple[int, int], width: int, *, device: torch.device | str | None = None) -> Tensor:
    """Fixed 2-D sine-cosine position table of the absolute patch index, `(1 + N, D)` float32. `grid` is (rows,
    columns), N = rows x columns in row-major order. The class token's row, first, is zero. Raises ValueError, see
    `sincos_at`."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    table_ND = sincos_at(torch.cartesian_prod(rows, columns).T, width)
    return torch.cat([table_ND.new_zeros(1, width), table_ND])


def sincos_at(places_2N: Tensor, width: int) -> Tensor:
    """The same of patches at these (row, column), `(2, N)` int64 -> `(N, D)` float32.

    The four quarters of the width are sin(x), cos(x), sin(y), cos(y), with D/4 frequencies spaced geometrically from 1
    to 1/10,000, both ends included (denominator D/4 - 1).
    Source: docs/reference.md (vit.py:146). OpenCLIP's `sin_cos_2d` divides by
    D/4 instead, which differs by up to 0.021 at 16 x 16 x 1024.

    Raises ValueError if the width is not a multiple of 4 or is smaller than 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"the 2-D sine-cosine table needs a width divisible by 4 and at least 8, got {width}")
    quarter = width // 4
    # float64, so that the table does not depend on the device's float32 pow.
    omega = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64, device=places_2N.device) / (quarter - 1))
    y_angles, x_angles = (places_N[:, None] * omega for places_N in places_2N.double())
    return torch.cat([x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=1).float()
